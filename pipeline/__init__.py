"""Turn image collections into labels and embeddings with residual networks.

The verbs of the command line are functions here, with the same names:

    >>> import pipeline
    >>> report = pipeline.run("config.yaml")  # doctest: +SKIP
    >>> rows = pipeline.read(report.output_url).to_pandas()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline import errors as errors

if TYPE_CHECKING:
    from pipeline.api import dead_letters, demo, init, plan, predict, preview, prune, read, run, status, submit, verify
    from pipeline.config import JobConfig, load_config
    from pipeline.model.zoo import get_resnet

__all__ = [
    "JobConfig",
    "dead_letters",
    "demo",
    "get_resnet",
    "init",
    "load_config",
    "plan",
    "predict",
    "preview",
    "prune",
    "read",
    "run",
    "status",
    "submit",
    "verify",
]

__version__ = "0.1.0"

_HOME = {"JobConfig": "pipeline.config", "load_config": "pipeline.config", "get_resnet": "pipeline.model.zoo"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: a worker that decodes images should not pay for the command line."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "pipeline.api")), name)
