"""The command line: parses, calls the function of the same name, prints, exits. Everything else is in `api`."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.text import Text

import pipeline
from pipeline import api
from pipeline.config import JobConfig, load_config
from pipeline.errors import ConfigError, ExitCode, PipelineError, redact
from pipeline.estimation import describe
from pipeline.report import counted, facts, summary
from pipeline.tables import errors_shown, gone_shown, pruned_shown, rows_shown

if TYPE_CHECKING:
    pass

NOT_A_TERMINAL = 10_000  # columns: a log or a pipe gets whole lines

app = typer.Typer(
    name="resnet-batch",
    help="Turn image collections into labels and embeddings with residual networks.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `resnet-batch demo`, then `resnet-batch run input.url=photos/ output.url=labels --limit 5`.\n\n"
    "Exit codes: 0 complete · 1 failed · 2 bad usage or config · 3 incomplete, run again to go on.",
)

ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        help="A YAML file, section.key=value words that override it, or both; input.url and output.url are needed.",
        metavar="CONFIG|KEY=VALUE",
    ),
]
OutputUrl = Annotated[str, typer.Argument(help="The dataset: a folder or s3://…", metavar="OUTPUT_URL")]
CONFIG_HELP = "Needed where the dataset is reached by a `storage` section. Taken in place of the last run's config."
SAMPLE_HELP = "Recompute N rows from their source bytes. A custom network is found as in `run`, else give --config."
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP)]
RetryOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CLASS[,CLASS…]",
        help="Redo finished shards that have error rows of these classes; `all` for any.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks and all log messages.")]


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"- `resnet-batch {command}`" for command in commands)])


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"resnet-batch {pipeline.__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "run nightly.yaml",
        "run nightly.yaml model.name=resnet18 model.weights=IMAGENET1K_V1",
        "run input.url=photos/ output.url=labels",
        "run nightly.yaml --limit 5",
        "run nightly.yaml --retry-errors too_large,truncated",
    )
)
def run(
    arguments: ConfigArguments = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Predict and print the first N samples; write nothing.")
    ] = None,
    retry_errors: RetryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Label and embed what is new or changed."""
    with _reporting(debug) as out:
        config = _config(arguments)
        if limit is not None and retry_errors:
            raise ConfigError("--limit prints samples and writes nothing, so that there is nothing to --retry-errors.")
        if limit is not None:
            rows = api.preview(config, limit)
            _print(rows.to_pylist(), as_json, out, lambda: rows_shown(rows))
            return
        report = api.run(config, retry_errors or ())
        _print(report, as_json, out, lambda: summary(report))
        raise typer.Exit(report.exit_code)


@app.command(
    epilog=_examples(
        "plan nightly.yaml",
        "plan nightly.yaml --json",
        "plan nightly.yaml --retry-errors all",
        "plan nightly.yaml --estimate --price 12.50",
    )
)
def plan(
    arguments: ConfigArguments = None,
    retry_errors: RetryOption = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure a sample and predict time, size, bottleneck and cost.")
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(min=0, metavar="AMOUNT", help="Per hour, of all machines together: adds the cost to --estimate."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What would run: shards, bytes, already done, gone from the input; on request what it will take."""
    with _reporting(debug) as out:
        found = api.plan(_config(arguments), retry_errors or (), estimate, price)
        result = {
            "todo": [redact(task.shard.url) for task in found.tasks],
            "bytes": found.num_bytes,
            "changed": [redact(url) for url in found.changed],
            "retried": [redact(url) for url in found.retried],
            "done": len(found.done),
            "gone": found.gone,
            "estimate": asdict(found.estimate) if found.estimate is not None else None,
        }
        why = f"{len(found.changed)} changed"
        if found.retried:
            why += f", {len(found.retried)} for their error rows"
        rows = {
            "to do": f"{counted(len(found.tasks), 'shard')}, {found.num_bytes / 1e6:,.1f} MB ({why})",
            "done": counted(len(found.done), "shard"),
            "gone": gone_shown(found.gone),
        }
        if found.estimate is not None:
            rows |= describe(found.estimate)
        _print(result, as_json, out, lambda: facts(rows))


@app.command(epilog=_examples("status s3://bucket/labels", "status labels --json"))
def status(
    url: OutputUrl, config: ConfigOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """What the dataset is, how much it holds, its last runs, and what of it is gone from the input."""
    with _reporting(debug) as out:
        found = api.status(url, config)
        rows = {
            "dataset": found.url,
            "model": " · ".join(
                f"{name} {value}" for name, value in found.model.items() if name in ("name", "weights")
            ),
            "shards": f"{found.shards:,} complete, {len(found.incomplete):,} to be done again",
            "rows": f"{found.predicted:,} predicted, {found.errors:,} errors, {found.num_bytes / 1e6:,.1f} MB",
            "gone": found.note or gone_shown(found.gone),
        } | {run["run_id"]: f"{run['message']} ({run['seconds'] or 0:.0f} s)" for run in found.last_runs}
        _print(found, as_json, out, lambda: facts(rows))


@app.command(
    epilog=_examples(
        "errors s3://bucket/labels",
        "errors labels --class too_large --class truncated --export bad --limit 20",
    )
)
def errors(
    url: OutputUrl,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Only error rows of this class; can be repeated."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the bytes of the bad samples there, for a look.")
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="With --export: at most so many.")] = 100,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The error rows, counted by class and by shard; on request the bytes behind them."""
    with _reporting(debug) as out:
        found = api.dead_letters(url, classes or (), export, limit, config)
        _print(found, as_json, out, lambda: errors_shown(found))


@app.command(epilog=_examples("prune nightly.yaml", "prune nightly.yaml --yes"))
def prune(
    arguments: ConfigArguments = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Without it, nothing is removed.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the shards that are gone from the input; with --yes, remove them from the dataset."""
    with _reporting(debug) as out:
        found = api.prune(_config(arguments), yes)
        _print(found, as_json, out, lambda: pruned_shown(found))


@app.command(epilog=_examples("verify s3://bucket/labels", "verify labels --sample 20 --config nightly.yaml"))
def verify(
    url: OutputUrl,
    sample: Annotated[int, typer.Option(min=0, metavar="N", help=SAMPLE_HELP)] = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a dataset from the outside; names every offender and exits 1 if there is one."""
    with _reporting(debug) as out:
        found = api.verify(url, sample, config)
        _print(asdict(found) | {"ok": found.ok}, as_json, out, lambda: Text(str(found)))
        raise typer.Exit(ExitCode.COMPLETE if found.ok else ExitCode.FAILED)


@app.command(
    epilog=_examples(
        "submit nightly.yaml",
        "submit nightly.yaml --address http://head:8265 --no-wait --submission-id tonight",
    )
)
def submit(
    arguments: ConfigArguments = None,
    address: Annotated[
        str, typer.Option(metavar="URL", help="The cluster's Ray dashboard, often a forwarded port.")
    ] = api.DASHBOARD,
    wait: Annotated[bool, typer.Option(help="Follow the log and exit as the job does.")] = True,
    submission_id: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name for the job, to find it again.")
    ] = None,
    retry_errors: RetryOption = None,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The same run, as a Ray job on a cluster."""
    with _reporting(debug) as out:
        with redirect_stdout(sys.stderr if as_json else out):  # the job's log is the result
            result = api.submit(_config(arguments), address, wait, submission_id, retry_errors or ())
        if as_json or not wait:
            _print({"exit_code" if wait else "submission_id": result}, as_json, out, lambda: str(result))
        if wait:
            raise typer.Exit(int(result))


@app.command(epilog=_examples("demo", "demo my-demo --pretrained"))
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where shards, rows and picture go.")] = Path(
        "demo-output"
    ),
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="ResNet-18 and ImageNet weights on photographs.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The whole path on real images in under a minute, nothing to configure."""
    with _reporting(debug) as out:
        with redirect_stdout(sys.stderr if as_json else out):
            report = api.demo(folder, pretrained)
        if as_json:
            _print(report, as_json, out, lambda: summary(report))
        raise typer.Exit(report.exit_code)


@app.command(epilog=_examples("init", "init nightly.yaml"))
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("config.yaml"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a commented config to start from."""
    with _reporting(debug) as out:
        text = f"wrote {api.init(path)}: set input.url and output.url, then `resnet-batch plan {path}`"
        _print({"path": str(path)}, as_json, out, lambda: Text(text))


def main() -> None:
    """The entry point of `resnet-batch` and of `python -m pipeline`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are not UTF-8; in JSON they stay valid
    app()


def _config(arguments: list[str] | None) -> JobConfig:
    """A first argument without `=` is the config file; all others are overrides."""
    if not arguments:
        raise ConfigError(
            "which job? Give input.url=photos/ and output.url=labels, or a config file: `resnet-batch init` writes one."
        )
    words = list(arguments)
    path = words.pop(0) if words and "=" not in words[0] else None
    return load_config(path, words)


@contextmanager
def _reporting(debug: bool) -> Iterator[TextIO]:
    """Gives stdout, which is for the result alone: whatever else prints meanwhile (Ray shows what its workers print)
    goes to stderr, and so do logs. An error is one sentence and an exit code, with a traceback only on request."""
    _log_to_stderr(debug)
    out = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield out
    except PipelineError as error:
        if debug:
            print(redact(traceback.format_exc()), file=sys.stderr)  # a cause may name a URL that it was sent on to
        text = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True, soft_wrap=True).print(text)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped on request. What is committed stays: run again to go on.", file=sys.stderr)
        raise typer.Exit(ExitCode.INCOMPLETE) from None


def _log_to_stderr(debug: bool) -> None:
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pipeline").setLevel(logging.DEBUG if debug else logging.INFO)


def _print(result: Any, as_json: bool, out: TextIO, shown: Callable[[], RenderableType]) -> None:
    if as_json:
        plain = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(json.dumps(plain, ensure_ascii=False), file=out)
    else:
        Console(file=out, width=None if out.isatty() else NOT_A_TERMINAL, highlight=False).print(shown())
