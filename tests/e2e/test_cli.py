"""The command line as a user meets it: results on standard output, one line and exit code 2 for bad input.

A process that loads torch takes seconds, so most tests call `main` in this one; a few go through a real process.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from commands import Run, assert_refused, process

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.trace import read_traces
from diffucoder.models.hub import SHIPPED, known_models

REQUEST = "Write a function total(nums) that sums the numbers."
QUICK = ("--new-tokens", "8", "--steps", "4", "--dtype", "float32")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be damaged."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


# --- a real process --------------------------------------------------------------------------------------------------


def test_a_process_answers_on_standard_output_alone() -> None:
    outcome = process("generate", REQUEST, *QUICK)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip()


def test_a_process_says_what_is_wrong_in_one_line() -> None:
    assert_refused(process("generate", REQUEST, "--model", "nobody"), "model 'nobody' is not a folder")


# --- generate --------------------------------------------------------------------------------------------------------


def test_json_has_the_documented_keys_and_they_agree(cli: Run) -> None:
    code, out, err = cli("generate", REQUEST, *QUICK, "--seed", 7, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert set(result) == {
        *("text", "tokens", "forward_passes", "tokens_per_forward", "seconds", "tokens_per_second"),
        *("finish_reason", "seed", "index", "problem", "model"),
    }
    assert (result["seed"], result["index"], result["model"]) == (7, 0, "tiny")
    assert result["finish_reason"] in ("stop", "length")
    assert 1 <= result["forward_passes"] <= 4
    assert result["tokens_per_forward"] == len(result["tokens"]) / result["forward_passes"]


def test_json_has_one_line_a_sample(cli: Run) -> None:
    out = cli("generate", REQUEST, *QUICK, "--json", "--num-samples", 3, "--temperature", 1).out
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0, 1, 2]


def test_several_answers_have_headings(cli: Run, tmp_path: Path) -> None:
    out = cli("generate", REQUEST, *QUICK, "--num-samples", 2).out
    assert re.findall(r"^--- .* ---$", out, re.MULTILINE) == ["--- answer 1 of 2 ---", "--- answer 2 of 2 ---"]
    (tmp_path / "requests.txt").write_text(f"{REQUEST}\n\nReverse the string.\n")
    out = cli("generate", "--prompts", tmp_path / "requests.txt", *QUICK).out
    first, second = re.split(r"--- request \d ---\n", out)[1:]
    assert (first, second) == (cli("generate", REQUEST, *QUICK).out, cli("generate", "Reverse the string.", *QUICK).out)


def test_requests_of_a_jsonl_file_are_numbered_in_json(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{REQUEST}\nAgain {n}."}) + "\n" for n in range(18)))
    rows = [json.loads(line) for line in cli("generate", "--prompts", path, *QUICK, "--json").out.splitlines()]
    assert [row["request"] for row in rows] == list(range(1, 19))
    path.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    assert_refused(cli("generate", "--prompts", path), f'{path}:2 has no text "prompt"')


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\f"])
def test_only_line_ends_end_a_request(cli: Run, tmp_path: Path, separator: str) -> None:
    request = f"{REQUEST}{separator}x"
    (tmp_path / "requests.txt").write_text(f"{request}\r\n", encoding="utf-8", newline="")
    (tmp_path / "requests.jsonl").write_text(json.dumps({"prompt": request}, ensure_ascii=False), encoding="utf-8")
    for name in ("requests.txt", "requests.jsonl"):
        assert cli("generate", "--prompts", tmp_path / name, *QUICK) == cli("generate", request, *QUICK)


def test_an_empty_answer_says_so(cli: Run) -> None:
    outcome = cli("generate", REQUEST, *QUICK, "--stop", "def", "--stop", " ")
    assert (outcome.code, outcome.out.strip()) == (0, "")
    assert outcome.err.startswith("note: an answer is empty")


def test_the_prompt_comes_from_an_argument_or_a_pipe(cli: Run) -> None:
    given = cli("generate", REQUEST, *QUICK)
    assert given.code == 0
    assert cli("generate", "-", *QUICK, stdin=REQUEST) == given


def test_raw_continues_the_prompt_without_a_template(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert cli("generate", "def f(x):", *QUICK, "--raw", "--trace", path).code == 0
    assert read_traces(path)[0].prompt_length < 10


def test_the_trace_can_be_read_back(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    result = json.loads(cli("generate", REQUEST, *QUICK, "--json", "--trace", path).out)
    (trace,) = read_traces(path)
    assert trace.tokens[trace.prompt_length :][: len(result["tokens"])] == result["tokens"]
    assert (trace.model, trace.params["steps"], trace.forward_passes) == ("tiny", 4, result["forward_passes"])


def test_the_preset_fast_fills_in_the_options_that_are_not_given(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    arguments = ("generate", REQUEST, "--new-tokens", 8, "--dtype", "float32", "--preset", "fast", "--trace", path)
    assert cli(*arguments).code == 0
    params = read_traces(path)[0].params
    assert (params["entropy_bound"], params["cache"]) == (0.01, "delayed")
    assert cli(*arguments, "--threshold", 0.5, "--cache", "none").code == 0
    params = read_traces(path)[0].params
    assert (params["entropy_bound"], params["threshold"], params["cache"]) == (None, 0.5, "none")


@pytest.mark.parametrize("command", ["generate", "evaluate", "order"])
def test_help_has_each_decoding_setting_once_with_its_default(cli: Run, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    options = re.findall(r"^  --(?:\[no-\])?([a-z-]+)", out, re.MULTILINE)
    assert len(options) == len(set(options))
    assert set(options) >= {f"{name.replace('_', '-')}" for name in DecodingParams.model_fields}
    assert "[default: exact]" in " ".join(out.split())


def test_watching_without_a_terminal_leaves_the_answer_alone(cli: Run) -> None:
    plain, watched = cli("generate", REQUEST, *QUICK), cli("generate", REQUEST, *QUICK, "--watch")
    assert (watched.code, watched.out) == (0, plain.out)
    assert " passes" in watched.err
    assert "\x1b" not in watched.out + watched.err


# --- infill ----------------------------------------------------------------------------------------------------------


def test_infill_prints_the_file_with_its_holes_filled(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("def f(xs):\n    <|hole:3|>\n    return <|hole:2|>\n")
    code, out, err = cli("infill", path, "--dtype", "float32")
    assert code == 0
    assert err.startswith("note: the model is unsure of this text")
    assert out.startswith("def f(xs):\n    ")
    assert "\n    return " in out
    assert "<|hole" in path.read_text()
    assert cli("infill", "-", "--dtype", "float32", stdin=path.read_text()).out == out


def test_infill_names_what_keeps_a_text_from_parsing(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text("def f(xs):\n    return <|hole:3|>\n")
    whole = cli("infill", path, "--syntax", "python")
    compile(whole.out, "whole", "exec")
    assert "rule of --syntax" not in whole.err
    path.write_text("def f(xs:\n    return <|hole:3|>\n")
    broken = cli("infill", path, "--syntax", "python", "--json")
    assert json.loads(broken.out)["problem"].startswith("line ")
    assert broken.err.startswith("note: a text breaks the rule of --syntax (line ")


def test_infill_in_place_writes_the_file_and_prints_nothing(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("def f(xs):\n    <|hole:3|>\n    return xs\n")
    wanted = cli("infill", path, "--dtype", "float32").out
    assert cli("infill", path, "--dtype", "float32", "--in-place")[:2] == (0, "")
    assert path.read_text() == wanted


def test_in_place_keeps_links_and_permissions(cli: Run, tmp_path: Path) -> None:
    path, link = tmp_path / "code.py", tmp_path / "link.py"
    path.write_text("x = <|hole:2|>\n")
    path.chmod(0o700)
    link.symlink_to(path)
    assert cli("infill", link, "--dtype", "float32", "--in-place").code == 0
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o700
    assert "<|hole" not in path.read_text()


def test_infill_watches_traces_and_gives_every_sample(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("def keep(nums):\n    nums = [n for n in nums if n % 2 == <|hole:1|>]\n    return nums\n")
    options = ("--dtype", "float32", "--num-samples", 2, "--trace", tmp_path / "trace.jsonl", "--watch", "--json")
    code, out, err = cli("infill", path, *options)
    assert code == 0
    assert "1 token, 1 pass," in err
    assert "unsure" not in err
    assert [json.loads(line)["index"] for line in out.splitlines()] == [0, 1]
    assert len(read_traces(tmp_path / "trace.jsonl")) == 2
    assert_refused(cli("infill", path, "--num-samples", 2, "--in-place"), "--in-place writes one text")


# --- fix -------------------------------------------------------------------------------------------------------------


def test_fix_prints_a_diff_and_writes_nothing_unless_it_is_told_to(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    broken = b"# Given a number, double the number.\r\ndef double(n):\r\n    return m * 2\r\n"
    path.write_bytes(broken)
    code, out, err = cli("fix", path, "--dtype", "float32")
    assert (code, path.read_bytes()) == (0, broken)
    assert "-    return m * 2" in out
    assert "line 3: NameError: nothing defines 'm'" in err
    assert cli("fix", path, "--dtype", "float32", "--write").code == 0
    assert path.read_bytes() == broken.replace(b"m *", b"n *")


def test_fix_exits_with_1_if_nothing_is_better(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("# A word.\ndef f(n):\n    return ((((((((((((n\n")
    code, out, err = cli("fix", path, "--dtype", "float32", "--passes", "60")
    assert (code, out, path.read_text()) == (1, "", "# A word.\ndef f(n):\n    return ((((((((((((n\n")
    assert err.count("\n") == 1
    assert "nothing better was found" in err


def test_fix_needs_asserts_to_test_with(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "tests.py").write_text("print(2)\n")
    assert_refused(cli("fix", tmp_path / "code.py", "--tests", tmp_path / "tests.py"), "has no assert")
    assert_refused(cli("fix", "-", "--write"), "--write needs a file")


# --- edit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_edit_writes_the_given_lines_again_and_nothing_else(cli: Run, tmp_path: Path, line_end: str) -> None:
    path = tmp_path / "code.py"
    lines = ["def f(nums):", "    # <|hole|> is text here", "    nums = sorted(nums)", "    return nums", ""]
    path.write_bytes(line_end.join(lines).encode())
    assert cli("edit", path, "--lines", "3", "--dtype", "float32", "--in-place")[:2] == (0, "")
    written = path.read_bytes().decode()
    assert written.startswith(line_end.join([*lines[:2], "    "]))
    assert written.endswith(line_end.join(["", *lines[3:]]))


def test_edit_lets_the_model_write_the_space_before_a_word(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text("# Given a number, double the number.\ndef double(n):\n    return n + 1\n")
    edited = "# Given a number, double the number.\ndef double(n):\n    return n * 2\n"
    assert cli("edit", path, "--lines", "3", "--dtype", "float32").out == edited


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a = 1\n\f\n    b = 2\nc = 3\n", "a = 1\n\f\n    "),
        ("a = '\u2028\x85'\nd = 1\n    b = 2\nc = 3\n", "a = '\u2028\x85'\nd = 1\n    "),
        ("a = 1\r\r\n    b = 2\r\nc = 3\n", "a = 1\r\r\n    "),
    ],
)
def test_lines_are_those_of_an_editor(cli: Run, tmp_path: Path, text: str, kept: str) -> None:
    path = tmp_path / "code.py"
    path.write_bytes(text.encode())
    assert cli("edit", path, "--lines", "3", "--dtype", "float32", "--in-place").code == 0
    written = path.read_bytes().decode()
    assert written.startswith(kept)
    assert written.endswith("\nc = 3\n")


def test_a_file_that_begins_with_a_mark_keeps_it_and_its_indentation(cli: Run, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_bytes("\ufeff    a = 1\nb = 2\n".encode())
    assert cli("edit", path, "--lines", "1", "--dtype", "float32", "--in-place").code == 0
    assert path.read_bytes().decode().startswith("\ufeff    ")


@pytest.mark.parametrize("lines", ["0", "6", "2:1", "x", "1:9", "2:3 --lines 3", "4 --lines 4"])
def test_lines_that_are_not_there_are_rejected(cli: Run, tmp_path: Path, lines: str) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 2\nc = 3\n\n")
    assert_refused(cli("edit", tmp_path / "code.py", "--lines", *lines.split()), "--lines")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n", b"\r"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_infill_in_place_changes_the_holes_alone(
    cli: Run, tmp_path: Path, mark: bytes, line_end: bytes, last: bytes
) -> None:
    path = tmp_path / "code.py"
    before = mark + line_end.join([b"x = 'e\xcc\x81\x0c\xe2\x80\xa8'", b"def f(xs):", b"    return "])
    after = b" + y" + line_end + b"z = 1" + last
    path.write_bytes(before + b"<|hole:3|>" + after)
    assert cli("infill", path, "--dtype", "float32", "--in-place")[:2] == (0, "")
    content = path.read_bytes()
    assert content.startswith(before)
    assert content.endswith(after)
    filled = content.removeprefix(before).removesuffix(after)
    if line_end == b"\r\n":
        assert filled.count(b"\n") == filled.count(b"\r\n")


def test_infill_reports_json(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def f(xs):\n    <|hole:3|>\n")
    result = json.loads(cli("infill", tmp_path / "code.py", "--json", "--dtype", "float32").out)
    assert result["text"].startswith("def f(xs):\n    ")
    assert len(result["tokens"]) == 3


# --- chat, models, bench ---------------------------------------------------------------------------------------------


def test_chat_answers_every_line_until_the_input_ends(cli: Run) -> None:
    once = cli("chat", *QUICK, stdin=f"{REQUEST}\n")
    twice = cli("chat", *QUICK, stdin=f"{REQUEST}\nReverse the string.\n\nnever read\n")
    assert (once.code, once.err, twice.code, twice.err) == (0, "", 0, "")
    assert twice.out.startswith(once.out)
    assert len(twice.out) > len(once.out)


def test_chat_forgets_rather_than_outgrow_the_context(cli: Run) -> None:
    lines = f"{REQUEST * 10}\n" * 2
    outcome = cli("chat", "--new-tokens", 280, "--steps", 1, "--dtype", "float32", stdin=lines)
    assert outcome.code == 0
    long, forgotten, long_again = outcome.err.splitlines()
    assert forgotten == "note: the conversation is longer than the model's context; it begins again here"
    assert long == long_again
    assert "tiny was trained on at most 192" in long


def test_chat_has_commands(cli: Run) -> None:
    lines = f"/set steps=4\n/set steps=none\n/help\n/settings\n/x\n{REQUEST}\n/clear\n{REQUEST}\n/exit\nx\n"
    code, out, err = cli("chat", "--new-tokens", 8, "--dtype", "float32", stdin=lines)
    assert code == 0
    assert "steps=4, new_tokens=8" in out
    assert out.count("/settings ") == 2  # once for /help, once for /x
    first, second = err.splitlines()[0], err.splitlines()[1:]
    assert first.startswith("note: steps='none': input should be a valid integer")
    assert second == ["note: /x is not a command", "note: the conversation is forgotten"]
    answer = cli("generate", REQUEST, *QUICK).out
    assert out.endswith(answer * 2)


def test_models_lists_what_is_here_and_what_can_be_fetched_with_licences(cli: Run) -> None:
    rows = [json.loads(line) for line in cli("models", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == ["tiny", *(known.name for known in known_models())]
    apple = [row for row in rows if row["source"].startswith("apple/")]
    assert len(apple) == 3
    assert all(row["licence"] == "apple-amlr (research only)" and row["size_gb"] == 15.2 for row in apple)
    assert (rows[0]["here"], rows[0]["licence"]) == (True, "Apache-2.0")
    code, out, _ = cli("models")
    assert code == 0
    for row in rows:
        assert f"{row['name']:21} {row['source']}\n" in out
        assert f"{row['note']}; {row['licence']}\n" in out
    assert max(map(len, out.splitlines())) <= 80


def test_bench_prints_figures_for_people_and_for_programs(cli: Run) -> None:
    sizes = ("--prompt-tokens", 4, "--new-tokens", 4, "--dtype", "float32")
    result = json.loads(cli("bench", *sizes, "--json").out)
    assert result["positions"] == 8
    assert result["share"] > 0
    assert result["share"] == pytest.approx(result["flops_per_second"] / result["matmul_flops_per_second"])
    printed = cli("bench", *sizes).out
    assert all(word in printed for word in ("ms", "GFLOP/s", "tokens/s", "tokens per pass"))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--steps", 0], ["steps=0", "greater than or equal to 1"]),
        (["--temperature", -1], ["temperature=-1", "greater than or equal to 0"]),
        (["--temperature", "inf"], ["temperature=inf", "finite"]),
        (["--top-p", 2], ["top_p=2", "less than or equal to 1"]),
        (["--top-k", 0], ["top_k=0"]),
        (["--policy", "best"], ["policy='best'", "'random', 'max_prob', 'margin' or 'entropy'"]),
        (["--preset", "fastest"], ["preset='fastest'", "'exact', 'reference' or 'fast'"]),
        (["--new-tokens", 0], ["new_tokens=0"]),
        (["--num-samples", 0], ["num_samples=0"]),
        (["--seed", -1], ["seed=-1"]),
        (["--stop", ""], ["stop.0=''"]),
        (["--dtype", "int3"], ["dtype='int3' is not known; use one of float32, bfloat16, float16"]),
        (["--device", "abacus"], ["device='abacus' is not on this machine; use 'cpu'"]),
        (["--device", "meta"], ["device='meta' is not on this machine"]),
        (["--model", "nobody"], ["model 'nobody' is not a folder", "cpgrpo"]),
        (["--model", "nobody/nothing"], ["'nobody/nothing'", "connect, or give a folder"]),
        (["--model", "cpgrpo"], ["'apple/DiffuCoder-7B-cpGRPO'", "the Hub cannot be reached"]),  # no network in tests
        (["--model", "/no/such/folder"], ["'/no/such/folder' is not a folder"]),
        (["--new-tokens", 600], ["new ones exceed the model's context of 512; shorten the prompt"]),
    ],
)
def test_bad_settings_are_one_line(cli: Run, arguments: list[object], parts: list[str]) -> None:
    assert_refused(cli("generate", REQUEST, *arguments), *parts)


def test_a_trace_that_cannot_be_written_does_not_cost_the_answer(cli: Run, tmp_path: Path) -> None:
    code, out, err = cli("generate", REQUEST, *QUICK, "--trace", tmp_path / "none" / "trace.jsonl")
    assert (code, out) == (2, cli("generate", REQUEST, *QUICK).out)
    assert err.startswith("error: trace file ")
    assert err.endswith("cannot be written (No such file or directory); check the path\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["generate"], "", ["the prompt is empty"]),
        (["generate", ""], "", ["the prompt is empty; write a request"]),
        (["generate", "Write", "a", "function"], "", ["(a function); quote a text that has spaces; see"]),
        (["generate", "-"], " \n", ["the prompt is empty"]),
        (["generate", "-"], b"caf\xe9", ["standard input", "not UTF-8"]),
        (["generate", "half \udcff"], "", ["is not Unicode; give it as UTF-8"]),
        (["generate", "word " * 600], "", ["exceed the model's context of 512; shorten the prompt"]),
        (["infill", "/no/such/file.py"], "", ["file '/no/such/file.py' cannot be read", "check the path"]),
        (["infill", "-"], "x = 1\n", ["has no hole to fill; mark one with <|hole|>"]),
        (["infill", "-"], "<|hole|> = 1\n", ["begins with a hole", "put text before"]),
        (["infill", "-"], "x = <|hole:none|>\n", ["hole '<|hole:none|>' is malformed"]),
        (["infill", "-"], "x = <|hole:9999|>\n", ["exceed the model's context of 512"]),
        (["infill", "-"], b"caf\xe9 <|hole|>", ["standard input", "not UTF-8"]),
        (["infill", "-", "--in-place"], "x = <|hole|>\n", ["--in-place needs a file"]),
        (["infill", "-", "--new-tokens", "9"], "x = <|hole|>\n", ["No such option", "--new-tokens", "infill --help"]),
        (["generate", "--steps", "abc", "x"], "", ["--steps", "integer", "generate --help"]),
        (["nonsense"], "", ["nonsense", "--help"]),
        (["chat"], "word " * 600, ["exceed the model's context of 512"]),
        (["chat", "--steps", "0"], "", ["steps=0"]),
        (["bench", "--new-tokens", "0"], "", ["new_tokens=0 leaves nothing to measure"]),
        (["bench", "--prompt-tokens", "600"], "", ["664 positions exceed the model's context of 512"]),
    ],
)
def test_bad_requests_are_one_line(cli: Run, arguments: list[str], stdin: str | bytes, parts: list[str]) -> None:
    assert_refused(cli(*arguments, stdin=stdin), *parts)


def test_a_folder_is_no_file_to_fill(cli: Run, tmp_path: Path) -> None:
    assert_refused(cli("infill", tmp_path), "cannot be read (Is a directory)")


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def overwrite(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)


def enlarge_vocabulary(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"word{number}" for number in range(100)])
    backend.save(str(folder / "tokenizer.json"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["has no config.json; is it a model's folder?"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read as JSON"]),
        (lambda folder: edit_config(folder, model_type="mamba"), ["model_type 'mamba' is not supported", "Dream"]),
        (lambda folder: edit_config(folder, hidden_size=128), ["has wrong shapes for"]),
        (lambda folder: edit_config(folder, num_hidden_layers=9), ["lacks model.layers.", "do not match"]),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            ["lacks weight file model.safetensors; fetch it again"],
        ),
        (truncate, ["model.safetensors is damaged or cut short", "fetch it again"]),
        (overwrite, ["model.safetensors is damaged or cut short", "fetch it again"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["tokenizer cannot be read"]),
        (enlarge_vocabulary, ["use the tokenizer saved with the model"]),
        (
            lambda folder: edit_config(folder, mask_token_id=9),
            ["mask '<|mask|>' at 3, but the model's mask_token_id=9"],
        ),
    ],
)
def test_a_damaged_model_is_one_line(
    cli: Run, damaged: Path, damage: Callable[[Path], object], parts: list[str]
) -> None:
    damage(damaged)
    assert_refused(cli("generate", REQUEST, "--model", damaged), *parts)


def test_an_undamaged_copy_writes_like_the_shipped_model(cli: Run, damaged: Path) -> None:
    assert cli("generate", REQUEST, *QUICK, "--model", damaged) == cli("generate", REQUEST, *QUICK)


@pytest.mark.parametrize("arguments", [["generate", REQUEST, "--steps", "many"], ["generate", "--colour"], ["paint"]])
def test_a_command_line_that_is_none_says_how_to_get_help(cli: Run, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert "--help" in outcome.err
