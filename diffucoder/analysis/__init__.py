"""What models do while they write: figures of recorded Steps, and a page to look at them. Nothing here decodes."""
