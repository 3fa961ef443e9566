"""The command line: one door, thin commands over the Python objects.

Heavy imports happen inside the commands, so that `--help` answers at once. Sampling options are made from the fields of
`DecodingParams`: names, defaults and help are written there, once.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffucoder.analysis.settings import Conventions
from diffucoder.config import all_settings, load_settings
from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import ConfigError, DiffuCoderError, PromptError
from diffucoder.options import with_options
from diffucoder.training.settings import STAGES, TrainSettings

if TYPE_CHECKING:
    import torch

    from diffucoder.decoding.canvas import Canvas
    from diffucoder.decoding.coder import DiffuCoder, Generation

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Write code in any order with masked-diffusion language models.",
    epilog='Start here: diffucoder generate "Write a function that reverses the string." --watch',
)

Model = Annotated[
    str | None, typer.Option(help="folder, hub id, or name from `diffucoder models`; the shipped one if left out")
]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, int8 (on a CPU); what is fast here if left out")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; the best there is if left out")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object per result instead of text")]
Watch = Annotated[bool, typer.Option("--watch", help="show the canvas filling in, coloured by step")]
Raw = Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without a chat template (base models)")]
File = Annotated[Path | None, typer.Option("--file", help="read the prompt from a file")]
Text = Annotated[str | None, typer.Argument(help="the request; - reads it from standard input")]

_UsageError: Any = typer.BadParameter.__base__  # Any: typer names only this child of it, and moved it between versions
_REPORTED = (  # by --json, besides the model's name
    *("text", "tokens", "forward_passes", "tokens_per_forward", "seconds", "tokens_per_second"),
    *("finish_reason", "seed"),
)


def main() -> None:
    """Run the command line; bad input is one line on standard error and exit code 2, never a traceback."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="diffucoder", standalone_mode=False) or 0)
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "diffucoder"
        print(f"error: {error.format_message().rstrip('.')}; see {where} --help", file=sys.stderr)
        sys.exit(2)
    except DiffuCoderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output left
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


@app.command()
@with_options
def generate(
    prompt: Text = None,
    *,
    file: File = None,
    model: Model = None,
    raw: Raw = False,
    watch: Watch = False,
    as_json: Json = False,
    trace: Annotated[Path | None, typer.Option(help="write the order of commitment to this JSONL file")] = None,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Answer a request with code."""
    request = _read_text(prompt, file)
    coder = _load(model, dtype, device)
    canvas = coder.canvas([request], params, chat=not raw)
    results = _decode(coder, canvas, params, watched=watch)
    for result in results:
        _print(result, coder, as_json=as_json)
    if trace is not None:
        from diffucoder.decoding.trace import write_traces

        write_traces(trace, [result.trace for result in results])


@app.command()
@partial(with_options, without=("new_tokens", "stop"))  # holes say how long they are, and where they end
def infill(
    path: Annotated[str, typer.Argument(help="a file with holes, <|hole|> or <|hole:12|>; - for standard input")],
    *,
    model: Model = None,
    as_json: Json = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="write the filled text back to the file")] = False,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Fill every hole of a file, all of them jointly."""
    text = _read_text("-", None) if path == "-" else _read_text(None, Path(path))
    if in_place and path == "-":
        raise ConfigError("--in-place needs a file to write to, and '-' is standard input; give a path")
    coder = _load(model, dtype, device)
    result = coder.fill(text, params)
    if in_place:
        try:
            Path(path).write_text(result.text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"file {path!r} cannot be written ({error.strerror}); leave out --in-place") from None
    if as_json or not in_place:
        _print(result, coder, as_json=as_json)


@app.command()
@partial(with_options, without=("num_samples",))  # a conversation goes one way
def chat(
    *, model: Model = None, watch: Watch = False, dtype: DType = None, device: Device = None, params: DecodingParams
) -> None:
    """Talk to a model; an empty line or end of file ends the conversation."""
    coder = _load(model, dtype, device)
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        try:
            canvas = coder.canvas([messages], params)
        except PromptError:
            if len(messages) == 1:
                raise
            messages = messages[-1:]  # the conversation outgrew the context: go on from here
            print("(the conversation outgrew the model's context; starting anew)", file=sys.stderr)
            canvas = coder.canvas([messages], params)
        result = _decode(coder, canvas, params, watched=watch)[0]
        _print(result, coder, as_json=False)
        messages.append({"role": "assistant", "content": result.text})


@app.command()
def serve(
    *,
    model: Model = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is everybody's")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="name=value of decoding, where requests say nothing; repeatable")
    ] = None,
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="name=value: max_batch, max_waiting, deadline, ...; repeatable")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file of the key that clients must send; else $DIFFUCODER_API_KEY, else none")
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="origin whose pages may ask; repeatable")] = None,
    dtype: DType = None,
    device: Device = None,
    ray: Annotated[bool, typer.Option("--ray", help="serve by replicas: Ray's, here or at $RAY_ADDRESS")] = False,
    replicas: Annotated[str, typer.Option(help="with --ray: how many; MIN:MAX follow the load")] = "1",
    cpus: Annotated[int | None, typer.Option(help="of a replica; an equal share of those here if left out")] = None,
    gpus: Annotated[float | None, typer.Option(help="of a replica; an equal share of those here if left out")] = None,
) -> None:
    """Serve a model: OpenAI's completions and chat, infilling, holes and edits."""
    try:
        from diffucoder.serving.app import create_app
        from diffucoder.serving.engine import load_in_own_thread
        from diffucoder.serving.run import read_api_key, run
        from diffucoder.serving.settings import EngineSettings, ScaleSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f'serving needs {error.name}; install it: pip install "diffucoder[serve]"') from None
    if not ray and (replicas, cpus, gpus) != ("1", None, None):
        raise ConfigError("--replicas, --cpus and --gpus are for Ray's replicas; add --ray")
    settings = ScaleSettings(
        api_key=read_api_key(api_key_file),
        cors=tuple(cors or ()),
        decoding=load_settings(DecodingParams, overrides=changes or ()),
        engine=load_settings(EngineSettings, overrides=limits or ()),
        model=model,
        dtype=dtype,  # type: ignore[arg-type]  # pydantic checks it
        device=device,
        replicas=replicas,
        cpus=cpus,
        gpus=gpus,
    )
    if not ray:
        coder = load_in_own_thread(lambda: _load(model, dtype, device))
        run(create_app(coder, settings), host=host, port=port)
        return
    try:
        from diffucoder.serving.scale import run_replicas
    except ModuleNotFoundError as error:
        raise ConfigError(f'replicas need {error.name}; install it: pip install "diffucoder[scale]"') from None
    run_replicas(settings, host=host, port=port)


@app.command()
def models() -> None:
    """List the models that are here, and those that can be fetched."""
    from rich.console import Console
    from rich.table import Table

    from diffucoder.models.hub import KNOWN_MODELS, SHIPPED

    table = Table("name", box=None)
    for heading in ("model", "parameters", "size", "licence", "here", "note"):
        table.add_column(heading, overflow="fold")  # never cut: these are to be copied
    if SHIPPED.is_dir():
        stored = (SHIPPED / "model.safetensors").stat().st_size
        figures = f"{stored / 2e6:.1f}M", f"{stored / 1e6:.0f} MB", "Apache-2.0"
        table.add_row("(default)", "tiny, shipped", *figures, "yes", "short functions; see docs/models.md")
    for known in KNOWN_MODELS:
        here = "yes" if known.cached else "no"
        size = f"{known.size_gb} GB"
        table.add_row(known.name, known.hub_id, known.parameters, size, known.licence, here, known.note)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="folder, hub id or .gguf file of the model")],
    out: Annotated[Path, typer.Argument(help="folder to write; with --gguf a .gguf file")],
    *,
    pad: Annotated[
        bool, typer.Option("--pad", help="add <|dlm_pad|> where the parent pads with its end of text")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="write a diffusion model as a dream GGUF, for llama.cpp")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, with --gguf also q8_0; the model's own if left out")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
) -> None:
    """Make a denoiser of an autoregressive model, or a GGUF file of a denoiser."""
    if gguf != (out.suffix == ".gguf"):
        rule = "no .gguf file" if gguf else "a .gguf file, which only --gguf writes"
        raise ConfigError(
            f"OUT={str(out)!r} is {rule}; write diffucoder convert SOURCE FOLDER, or SOURCE OUT.gguf --gguf"
        )
    if gguf and pad:
        raise ConfigError(
            "--pad adds a token to a parent and --gguf writes a model as it is; convert first, then export"
        )
    from diffucoder.models.convert import convert as convert_parent
    from diffucoder.models.convert import export

    if gguf:
        denoiser = export(source, out, dtype=dtype, revision=revision)
    else:
        denoiser = convert_parent(source, out, pad=pad, dtype=_dtype(dtype), revision=revision)
    kind = "dream GGUF" if gguf else "denoiser, untrained"
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    print(f"{out}: {kind}, {size:.1f} M parameters, mask at {denoiser.mask_id} of {denoiser.vocab_size} tokens")


def _add_training_stages() -> None:
    """`diffucoder train STAGE`: one command a stage, whose help lists its settings."""
    stages = typer.Typer(help="Train a model, stage by stage; recipes/ holds settings to begin with.")
    app.add_typer(stages, name="train")
    for name, kind in STAGES.items():
        stages.command(name, help=_training_help(kind))(_train)


def _training_help(kind: type[TrainSettings]) -> str:
    """What the stage is, and every setting with its default."""
    lines = []
    for name, field in all_settings(kind):
        default = "" if field.is_required() else f" [{field.default}]"
        lines.append(f"{name}{default}: {field.description}")
    summary = (kind.__doc__ or "").splitlines()[0]
    return f"{summary}\n\nSettings, in RECIPE or as --set name=value:\n\n\b\n" + "\n".join(lines)


def _train(
    context: typer.Context,
    recipe: Annotated[Path | None, typer.Argument(help="TOML file of settings")] = None,
    *,
    changes: Annotated[list[str] | None, typer.Option("--set", help="name=value, over the file; repeatable")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run folder's newest checkpoint")] = False,
) -> None:
    overrides = [*(changes or ()), *(["resume=true"] if resume else [])]
    stage = str(context.info_name)
    settings = load_settings(STAGES[stage], recipe, overrides)
    try:
        function = getattr(import_module(f"diffucoder.training.{stage}"), stage)
    except ModuleNotFoundError as error:
        raise ConfigError(f'training needs {error.name}; install it: pip install "diffucoder[train]"') from None
    folder = function(settings)
    from diffucoder.training.processes import exit_worker, first_process

    if first_process():  # every process of a distributed run comes here
        then = f"convert {folder} START" if stage == "pretrain" else f"generate --model {folder} ..."
        print(f"model in {folder}; try: diffucoder {then}")
    exit_worker()


_add_training_stages()


@app.command()
@partial(with_options, without=("steps", "temperature"))  # which may be several here
def evaluate(
    benchmark: Annotated[
        str, typer.Argument(help="tiny, humaneval, humaneval+, mbpp, mbpp+, humaneval-infilling, ...")
    ],
    *,
    model: Model = None,
    samples: Annotated[
        Path | None, typer.Option(help="grade this file of completions (JSONL, also .gz) instead of a model")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder of published files; the hub if left out")] = None,
    run: Annotated[Path | None, typer.Option(help="run folder; one below runs/evaluate if left out")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first tasks only")] = None,
    raw: Raw = False,
    steps: Annotated[
        str | None, typer.Option(help="denoising steps; several, as in 512,256, are runs of their own")
    ] = None,
    temperature: Annotated[str | None, typer.Option(help="randomness of the tokens; also several")] = None,
    batch: Annotated[int, typer.Option(min=1, help="tasks decoded together")] = 8,
    workers: Annotated[int | None, typer.Option(min=1, help="programs run at a time; one a core if left out")] = None,
    packages: Annotated[
        list[Path] | None, typer.Option(help="folder of packages that programs may import; repeatable")
    ] = None,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="run programs WITHOUT a sandbox, as yourself")] = False,
    as_json: Json = False,
    dtype: DType = None,
    device: Device = None,
    params: DecodingParams,
) -> None:
    """Measure a model, or anybody's completions, on a benchmark: pass@1 and a verdict for every task.

    Called again it goes on where it was stopped. Programs run in the sandbox.
    """
    from diffucoder.evaluation import evaluate as evaluation
    from diffucoder.evaluation.benchmarks import load
    from diffucoder.evaluation.samples import Generator, sweep
    from diffucoder.grading.sandbox import Sandbox

    if samples is not None:
        about_models = {"model": model, "raw": raw, "steps": steps, "temperature": temperature, "batch": batch != 8}
        about_models |= {"dtype": dtype, "device": device, **params.model_dump(exclude_defaults=True)}
        _refuse_with_samples(about_models)
    tasks = load(benchmark, data)
    if not any(task.judged for task in tasks):
        raise ConfigError(f"{benchmark!r} has no tests to evaluate answers by; diffucoder order looks at their order")
    with Sandbox(workers, packages=packages or (), unsafe=unsafe) as sandbox:
        about = evaluation.Evaluation(benchmark, tasks, sandbox, evaluation.cache_folder(), limit, _progress())
        asked = evaluation.task_settings(benchmark, limit, packages or ())
        if samples is not None:
            settings = {**asked, "samples": evaluation.content_hash(samples)}
            _print_report(about.of_samples(samples, run, settings), as_json=as_json)
            return
        several = list(sweep(params, steps, temperature))
        coder = _load(model, dtype, device)
        for each in several:
            generator = Generator(coder, each, raw=raw, batch=batch)
            settings = evaluation.model_settings(asked, generator, model)
            folder = evaluation.run_folder(run, settings, several=len(several) > 1)
            _print_report(about.of_model(generator, folder, settings), as_json=as_json, folder=folder)


def _refuse_with_samples(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what would mean nothing. Any: values of options."""
    for name, value in given.items():
        if value:
            option = name.replace("_", "-")
            raise ConfigError(f"--samples are graded as they are, and --{option} is for a model; give one of the two")


def _progress() -> "Callable[..., Any]":
    """A bar on standard error for each stage of an evaluation; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def shown(things: Any, count: int, what: str) -> Any:
        return track(things, what, count, console=console) if console.is_terminal and count else things

    return shown


def _print_report(report: dict[str, Any], *, as_json: bool, folder: Path | None = None) -> None:
    if as_json:
        print(json.dumps(report))
        return
    solved = f"{report['benchmark']}: {report['tasks']} tasks, {report['samples']} samples"
    for what in ("missing", "skipped"):
        if report[what]:
            solved += f", {len(report[what])} {what}"
    print(solved)
    for name, figure in report.items():
        if name.startswith(("pass@", "base_pass@")) and isinstance(figure, float):
            low, high = report.get(f"{name}_interval", (None, None))
            interval = "" if low is None else f"   (95 %: {low:.1%} - {high:.1%})"
            print(f"  {name:20} {figure:6.1%}{interval}")
    for name in ("tokens_per_forward", "tokens_per_second"):
        if report.get(name) is not None:
            print(f"  {name:20} {report[name]:6.2f}")
    if report["untrusted"]:
        print(f"  untrusted            {report['untrusted']:6}   verdicts whose tests ran beside the program")
    if folder:
        print(f"  samples, verdicts and report are in {folder}")


@app.command()
@partial(with_options, of=Conventions, into="conventions")
@partial(with_options, without=("steps", "temperature", "policy"))  # which may be several here
def order(
    prompts: Annotated[
        str | None, typer.Argument(help="a benchmark as of evaluate, gsm8k, or JSONL of prompts, maybe with tests")
    ] = None,
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="as elsewhere, or tiny, the shipped one; several are compared")
    ] = None,
    traces: Annotated[
        list[Path] | None, typer.Option(help="report on this file of traces, or folder of a run, instead; repeatable")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="folder of published files; the hub if left out")] = None,
    run: Annotated[Path | None, typer.Option(help="folder for runs and report; below runs/order if left out")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="the first prompts only")] = None,
    raw: Raw = False,
    steps: Annotated[str | None, typer.Option(help="denoising steps; several, as in 64,32: runs of their own")] = None,
    temperature: Annotated[str | None, typer.Option(help="randomness of the tokens; also several")] = None,
    policy: Annotated[str | None, typer.Option(help="which positions come first; also several")] = None,
    maps: Annotated[int, typer.Option(min=0, help="prompts whose entropies are kept at every step")] = 8,
    show: Annotated[int, typer.Option(min=1, help="samples of each run that the page holds")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="prompts decoded together")] = 8,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="run programs WITHOUT a sandbox, as yourself")] = False,
    as_json: Json = False,
    dtype: DType = None,
    device: Device = None,
    conventions: Conventions,
    params: DecodingParams,
) -> None:
    """Analyse the order in which models write: AR-ness, entropies, what comes first; a page to look at it.

    Called again it goes on where it was stopped. Answers are graded, in the sandbox, where there are tests.
    """
    if (prompts is None) == (not traces):
        raise ConfigError("give PROMPTS for a model, or --traces of what was written already; one of the two")
    try:
        from diffucoder.analysis.report import summary, write
    except ModuleNotFoundError as error:
        raise ConfigError(f'the report needs {error.name}; install it: pip install "diffucoder[report]"') from None
    run = run or Path("runs/order") / Path(prompts or "traces").stem
    folders = list(traces or ())
    if prompts is not None:
        from diffucoder.evaluation import evaluate as evaluation
        from diffucoder.evaluation.benchmarks import load
        from diffucoder.evaluation.samples import Generator, sweep
        from diffucoder.grading.sandbox import Sandbox

        tasks, several = load(prompts, data), list(sweep(params, steps, temperature, policy))
        asked = evaluation.task_settings(prompts, limit, ())
        names = [None if name == "tiny" else name for name in model or ["tiny"]]
        with Sandbox(unsafe=unsafe) as sandbox:
            about = evaluation.Evaluation(prompts, tasks, sandbox, evaluation.cache_folder(), limit, _progress())
            for name in names:
                coder = _load(name, dtype, device)
                for each in several:
                    generator = Generator(coder, each, raw=raw, batch=batch, traces=True, maps=maps)
                    settings = evaluation.model_settings(asked, generator, name)
                    folders.append(evaluation.run_folder(None, settings, several=False, below=run))
                    about.of_model(generator, folders[-1], settings)
    told = write(run, folders, conventions, show=show)
    print(json.dumps(told) if as_json else summary(told, run))


@app.command()
def bench(
    *,
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of the prompt")] = 32,
    new_tokens: Annotated[int, typer.Option(help="masked tokens behind it")] = 64,
    batch: Annotated[int, typer.Option(help="rows decoded together")] = 1,
    as_json: Json = False,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Measure a model here: ms per forward pass, tokens per second, share of this machine's matmul."""
    from diffucoder.bench import bench as measure

    result = measure(_load(model, dtype, device).model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    if as_json:
        print(json.dumps(asdict(result) | {"share": result.share}))
        return
    machine = f"{result.dtype}, {result.device}, {result.threads} threads"
    achieved, matmul = result.flops_per_second / 1e9, result.matmul_flops_per_second / 1e9
    print(f"model      {result.parameters / 1e6:.1f} M parameters, {machine}")
    print(f"canvas     {result.batch} x {result.positions} positions, {new_tokens} masked")
    print(f"forward    {result.forward_ms:.2f} ms, {result.forward_flops / 1e9:.2f} GFLOP")
    print(f"achieved   {achieved:.0f} GFLOP/s, {result.share:.0%} of the {matmul:.0f} GFLOP/s of a matmul here")
    print(f"decoding   {result.tokens_per_second:.0f} tokens/s at {result.tokens_per_forward:.2f} tokens per pass")


def _read_text(text: str | None, file: Path | None) -> str:
    """The request, from where the user put it. Raises PromptError."""
    if (text is None) == (file is None):
        raise PromptError("give the prompt once: as an argument, as - for standard input, or by --file")
    if text is not None and text != "-":
        return text
    try:
        return sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PromptError(f"{'standard input' if file is None else file} is not UTF-8 text; convert it") from None
    except OSError as error:
        raise PromptError(f"file {str(file)!r} cannot be read ({error.strerror}); check the path") from None


def _load(model: str | None, dtype: str | None, device: str | None) -> "DiffuCoder":
    from diffucoder.decoding.coder import DiffuCoder

    return DiffuCoder.load(model, dtype=_dtype(dtype, int8=True), device=device)


def _dtype(name: str | None, *, int8: bool = False) -> "torch.dtype | None":
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known |= {"int8": torch.int8} if int8 else {}
    if name is not None and name not in known:
        raise ConfigError(f"dtype={name!r} is not known; use one of {', '.join(known)}")
    return known[name] if name else None


def _decode(coder: "DiffuCoder", canvas: "Canvas", params: DecodingParams, *, watched: bool) -> "list[Generation]":
    from rich.console import Console

    from diffucoder.watch import CanvasView, progress, watch

    console = Console(stderr=True)
    if watched:
        view = CanvasView(coder.tokenizer, canvas.masked[0])
        return coder.decode(canvas, params, through=lambda steps: watch(steps, view, console))
    if not console.is_terminal:
        return coder.decode(canvas, params)
    wanted = int(canvas.masked.sum()) * params.num_samples
    return coder.decode(canvas, params, through=lambda steps: progress(steps, wanted, console))


def _print(result: "Generation", coder: "DiffuCoder", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: getattr(result, name) for name in _REPORTED} | {"model": coder.name}))
    else:
        print(result.text, end="" if result.text.endswith("\n") else "\n")


if __name__ == "__main__":
    main()
