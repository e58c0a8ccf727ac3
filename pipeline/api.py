"""The verbs, as Python functions with the names that the command line has; but `errors` is `dead_letters` here, and
`run --limit` is `preview`. `read` and `predict` have no command."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.config import JobConfig, load_config, make_config
from pipeline.error_classes import choose_classes
from pipeline.errors import ConfigError
from pipeline.storage import Store
from pipeline.urls import with_absolute_urls

if TYPE_CHECKING:
    from pipeline.error_rows import DeadLetters
    from pipeline.outputs.dataset import Dataset
    from pipeline.overview import Status
    from pipeline.planning import Plan
    from pipeline.pruning import Pruned
    from pipeline.report import RunReport
    from pipeline.verification import Verification

log = logging.getLogger(__name__)

DASHBOARD = "http://127.0.0.1:8265"  # of a Ray that runs here, or that is forwarded to here

Config = JobConfig | Mapping[str, Any] | str | Path


def _load(config: Config) -> JobConfig:
    """The job, whatever folder its workers stand in."""
    if not isinstance(config, JobConfig):
        config = make_config(config) if isinstance(config, Mapping) else load_config(config)
    return with_absolute_urls(config)


def _dataset(url: str | Path, config: Config | None) -> tuple[Dataset, JobConfig | None]:
    """The dataset at a URL, in the store of this config if one is given; and the config."""
    from pipeline.outputs.dataset import Dataset

    job = _load(config) if config is not None else None
    return Dataset(str(url), Store(job.output_storage) if job is not None else Store()), job


def run(config: Config, retry_errors: Iterable[str] | str = ()) -> RunReport:
    """Label and embed what is new or changed in the input; commit shard by shard; say what was done.

    With `retry_errors`, names of error classes or "all", shards that are done and have such error rows are done again.

    `config` is a JobConfig, a mapping with its sections, or the path of a YAML file. Uses the Ray that this process
    is connected to, the cluster that runs this job, or what `runtime.address` names. The report's `exit_code` is 0
    (complete), 1 (not one prediction) or 3 (some shards stay open, run again). Raises a PipelineError where nothing
    could be done at all: ConfigError, ModelMismatch, WeightsError, AccessDenied, StoreUnavailable.
    """
    from pipeline.running import run as run_job

    return run_job(_load(config), retry_errors)


def plan(
    config: Config,
    retry_errors: Iterable[str] | str = (),
    estimate: bool = False,
    price_per_hour: float | None = None,
) -> Plan:
    """What a run would do now: the shards that are new or changed, those done, those gone. Opens no shard.

    With `estimate` it does, on the machines that the run would use: some hundred images of the input are read, decoded
    and predicted, and the plan's `estimate` says what the run will take. It is left in the dataset, for the run's
    report to score; None, with a warning, where no image of the sample can be decoded. `price_per_hour` is that of all
    machines together.
    """
    from pipeline.planning import make_plan, model_and_dataset, refuse_a_selection

    if price_per_hour is not None and not estimate:
        raise ConfigError("a price without an estimate says nothing: ask for the estimate as well (--estimate).")
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise ConfigError(f"a price is a number that is not negative; got {price_per_hour}.")
    job = _load(config)
    spec, dataset = model_and_dataset(job)  # a run would be refused for another model's dataset
    found = make_plan(job, retry_errors)
    refuse_a_selection(found, job)
    if not estimate or not found.tasks:
        return found
    from pipeline.sampling import estimate_plan

    return replace(found, estimate=estimate_plan(job, spec, dataset, found, price_per_hour))


def prune(config: Config, yes: bool = False) -> Pruned:
    """The shards that stand in the dataset and are gone from the input. With `yes` they are removed from the dataset,
    unless they change meanwhile. Nothing else removes them."""
    from pipeline.pruning import prune_dataset

    return prune_dataset(_load(config), yes)


def status(url: str | Path, config: Config | None = None) -> Status:
    """What the dataset at `url` is, how much it holds, its last runs, and which shards are gone from the input.

    The input is that of the last run, unless a config is given; its storage options are used as well.
    """
    from pipeline.overview import read_status

    return read_status(*_dataset(url, config))


def dead_letters(
    url: str | Path,
    classes: Iterable[str] | str = (),
    export: str | Path | None = None,
    limit: int = 100,
    config: Config | None = None,
) -> DeadLetters:
    """The error rows of the dataset at `url`, of some classes or of all, counted by class and by shard.

    With `export`, a local folder, the bytes behind at most `limit` of them are written there for a look, each to
    `<shard id>/<index>-<end of its key>`; source shards are found with the config of the last run, or the given one.
    """
    from pipeline.error_rows import count_errors, export_errors

    dataset, job = _dataset(url, config)
    chosen = choose_classes(classes)
    found = count_errors(dataset, chosen)
    if export is not None:
        found.export = export_errors(dataset, found, export, limit, chosen, job)
    return found


def verify(url: str | Path, sample: int = 0, config: Config | None = None) -> Verification:
    """Check a dataset from the outside: marks against parts, footers against rows, no row twice, nothing missing.

    What the input lists is compared with what stands; with `sample`, so many rows are recomputed. For both the given
    config is taken, or that of the last run.
    """
    from pipeline.verification import verify_dataset

    dataset, job = _dataset(url, config)
    return verify_dataset(dataset, sample, job)


def read(
    url: str | Path, columns: Sequence[str] | None = None, errors: bool = False, config: Config | None = None
) -> pa.Table:
    """The rows of the dataset at `url` as an Arrow table (`.to_pandas()` for pandas); with `errors`, its error rows."""
    from pipeline.outputs.dataset import read_table

    dataset, _ = _dataset(url, config)
    return read_table(dataset, "errors" if errors else "data", columns)


def predict(images: Any, config: Config) -> pa.Table:
    """Label and embed a few images in this process, without a cluster and without writing anything.

    `images`: one image or several, each a path or URL, encoded bytes, a Pillow image, or a uint8 array (H, W, 3) or
    (H, W). Rows come in the order of the images; one that can't be decoded has `error` and `message` set, and nulls
    elsewhere. The sections `input` and `output` of a mapping may be left out. Raises NotFound for a path where
    there is no file.
    """
    from pipeline.local import predict_images

    if isinstance(config, Mapping):
        config = {"input": {"url": "."}, "output": {"url": "."}} | dict(config)
    return predict_images(images, _load(config))


def preview(config: Config, limit: int) -> pa.Table:
    """The first `limit` samples of the input with their results, computed in this process; commits nothing."""
    from pipeline.local import preview_samples

    if limit < 1:
        raise ConfigError(f"a preview shows at least 1 sample; got {limit}.")
    return preview_samples(_load(config), limit)


def submit(
    config: Config,
    address: str = DASHBOARD,
    wait: bool = True,
    submission_id: str | None = None,
    retry_errors: Iterable[str] | str = (),
) -> int | str:
    """Run the config as a Ray job on the cluster whose dashboard is at `address`, such as head:8265.

    With `wait`, follows the log and returns the job's exit code; else returns the submission id at once. Works in a
    notebook cell as well. `retry_errors` as for `run`.
    """
    from pipeline.submission import submit_job

    return submit_job(_load(config), address, wait, submission_id, retry_errors)


def demo(folder: str | Path = "demo-output", pretrained: bool = False) -> RunReport:
    """The whole path on real images, with nothing to configure."""
    from pipeline.examples.demo import run_demo

    return run_demo(Path(folder), pretrained)


def init(path: str | Path = "config.yaml") -> Path:
    """Write a commented config to start from. Raises ConfigError where a file stands already."""
    target = Path(path)
    template = Path(__file__).with_name("template.yaml").read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(template)
    except FileExistsError:
        raise ConfigError(f"{target} exists already. Choose another name.") from None
    except OSError as cause:
        raise ConfigError(f"cannot write {target}: {cause.strerror}. Choose another place.") from None
    return target
