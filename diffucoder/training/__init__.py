"""Training: recipes over the diffusion objective. Today the shipped model (`tiny`); the paper's stages come next."""
