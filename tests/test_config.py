"""What a config may say, and what the person reads who said it wrong."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from pipeline.config import JobConfig, Storage, config_keys, load_config, make_config
from pipeline.errors import ConfigError
from pipeline.report import public_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "config.md"
TEMPLATE = ROOT / "pipeline" / "template.yaml"
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), TEMPLATE, ROOT / "infra/kubernetes/nightly.yaml"]
NEEDED = ["input.url=a", "output.url=b"]


def load(*overrides: str) -> JobConfig:
    return load_config(None, [*NEEDED, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def refusal_of(text: str | bytes, folder: Path) -> str:
    path = folder / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


# --- The documented keys -------------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, str]]:
    """Type and default of every key in docs/config.md; input.storage and output.storage have the keys of storage."""
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| (.+?) \| (.+?) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    keys = {key: (kind, default) for key, kind, default in rows}
    assert len(keys) == len(rows), "a key stands there twice"
    storage = {key: row for key, row in keys.items() if key.startswith("storage.")}
    for section in ("input", "output"):
        keys |= {f"{section}.{key}": row for key, row in storage.items()}
    return keys


def test_the_page_has_exactly_the_keys_that_there_are():
    headings = set(re.findall(r"^## `(\w+)`$", PAGE.read_text(), re.MULTILINE))
    assert set(documented()) | headings == set(config_keys(JobConfig))


def default_of(path: str) -> Any:
    section: Any = JobConfig
    *above, name = path.split(".")
    for step in above:
        kinds = [section.model_fields[step].annotation, *getattr(section.model_fields[step].annotation, "__args__", ())]
        section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    field = section.model_fields[name]
    return "needed" if field.is_required() else field.default


@pytest.mark.parametrize("path", documented())
def test_the_page_tells_the_true_default(path: str):
    default = default_of(path)
    text = default if isinstance(default, str) else json.dumps(default)
    assert documented()[path][1] in (text, f"`{text}`")


EXAMPLES = {
    "text": ["x", 1],
    "text or null": ["x", None, 1],
    "text, or list of text": ["x", ["x", "y"], 1, [], [1]],
    "list of text, text, or null": ["x", ["x"], None, 1],
    "64 hex digits, or null": ["a" * 64, None, "a" * 63],
    "true or false": [True, False, 1, "true"],
    "whole number": [0, -5, 1.5, "1", True],
    "whole number, at least 1": [1, 7, 0, 1.5, "1"],
    "whole number, at least 1, or null": [1, None, 0, "1"],
    "whole number, at least 1, or `auto`": [1, "auto", 0, "many"],
    "whole number, at least 0, or null": [0, 7, None, -1, "1"],
    "number from 0 to 1, or null": [0, 0.05, 1, None, 1.5, -0.1, "1"],
    "number above 0": [1, 0.5, 0, "1"],
    "list of 3 numbers, or null": [[0.5, 0.5, 0.5], None, [0.5], 0.5],
    "mapping": [{"anon": True}, {}, "x", None],
    "section or null": [{}, None, "x"],
}
VALID = {"text": 1, "text or null": 2, "text, or list of text": 2, "list of text, text, or null": 3}
VALID |= {"64 hex digits, or null": 2, "true or false": 2, "whole number": 2, "whole number, at least 1": 2}
VALID |= {"whole number, at least 1, or null": 2, "whole number, at least 1, or `auto`": 2, "number above 0": 2}
VALID |= {"whole number, at least 0, or null": 3, "number from 0 to 1, or null": 4}
VALID |= {"list of 3 numbers, or null": 2, "mapping": 2, "section or null": 2}


def with_key(path: str, value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"input": {"url": "a"}, "output": {"url": "b"}}
    section = data
    *above, name = path.split(".")
    for step in above:
        section = section.setdefault(step, {})
    section[name] = value
    return data


@pytest.mark.parametrize("path", documented())
def test_the_page_tells_the_true_type(path: str):
    kind = documented()[path][0]
    choices = re.findall(r"`([^`]+)`", kind) if kind.startswith("`") else []
    examples = [*choices, "other", 1] if choices else EXAMPLES[kind]
    valid = len(choices) or VALID[kind]
    for value in examples[:valid]:
        make_config(with_key(path, value))
    for value in examples[valid:]:
        with pytest.raises(ConfigError, match=rf"^{re.escape(path)}[.:]"):
            make_config(with_key(path, value))


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.nme=x", 'model.nme: unknown key; did you mean model.name? (got "x")'),
        ("runtime.batchsize=3", "runtime.batchsize: unknown key; did you mean runtime.batch_size? (got 3)"),
        ("input.storage.endpoint=x", 'input.storage.endpoint: unknown key; did you mean input.storage.endpoint_url?'
                                     ' (got "x")'),
        ("model.transfrom.resize=3", "model.transfrom.resize: unknown key; did you mean model.transform.resize? (got 3)"),
        ("model.engine=eager", 'model.engine: unknown key; did you mean runtime.engine? (got "eager")'),
        ("url=x", 'url: unknown key; did you mean input.url or output.url? (got "x")'),
        ("resize=3", "resize: unknown key; did you mean model.transform.resize? (got 3)"),
        ("ouptut.top_k=3", "ouptut.top_k: unknown key; did you mean output.top_k? (got 3)"),
        ("zzz.bar=1", "zzz.bar: unknown key; valid keys here: input, model, output, runtime, storage (got 1)"),
        ("model.transform.foo=1", "model.transform.foo: unknown key; valid keys here: resize, crop, mean, std,"
                                  " interpolation, decode (got 1)"),
        ("output.top_k=five", 'output.top_k: must be a whole number (got "five")'),
        ("model.seed=18446744073709551616", "model.seed: must be from -2**63 to 2**64 - 1, as torch takes it (got 18446744073709551616)"),
        ("input.max_error_rate=1.5", "input.max_error_rate: must be at most 1 (got 1.5)"),
        ("output.top_k=0", "output.top_k: must be at least 1 (got 0)"),
        ("output.top_k=", "output.top_k: must be a whole number (got null)"),
        ("runtime.actors=1.5", "runtime.actors: must be a whole number or 'auto' (got 1.5)"),
        ("runtime.device=tpu", "runtime.device: must be 'auto', 'cpu' or 'cuda' (got \"tpu\")"),
        ("storage.shared=1", "storage.shared: must be true or false (got 1)"),
        ("storage.deadline_s=0", "storage.deadline_s: must be above 0 (got 0)"),
        ("input.url=2024", "input.url: must be text or a list; quote it to make it text (got 2024)"),
        ("input.url=[]", "input.url: must be text or a list of 1 or more (got [])"),
        ("input.url={a: b}", "input.url: must be text or a list"),
        ("input.url=''", 'input.url: must not be empty (got "")'),
        ("model.classes=[cat, yes]", "model.classes.1: must be text; quote it to make it text (got true)"),
        (
            "model.transform.mean=[123.7,116.3,103.5]",
            "model.transform.mean: pixels are on a scale from 0 to 1. Divide means on that of 0 to 255 by 255, and std too"
            " (got [123.7, 116.3, 103.5])",
        ),
        ("model.transform.mean=[0.5]", "model.transform.mean: must be a list of 3 or more (got [0.5])"),
        ("model.transform.std=[1,0,1]", "model.transform.std: every std must be above 0, since pixels are divided by"
                                        " it (got [1, 0, 1])"),
        ("model.sha256=abc", 'model.sha256: must be 64 hex digits (got "abc")'),
        ("model=resnet18", 'model: must be a section with keys of its own (got "resnet18")'),
        ("input.url=${nope}", "cannot make out the config: input.url: Interpolation key 'nope' not found."),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_path_its_value_and_what_would_be_right(override: str, message: str):
    assert refusal(override) == message


def test_every_mistake_is_named_at_once():
    lines = refusal("model.nme=x", "output.top_k=0", "runtime.device=tpu").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["model.nme", "output.top_k", "runtime.device"]


@pytest.mark.parametrize("weights", ["DEFAULT", "ResNet50_Weights.DEFAULT"])
def test_weights_that_change_between_releases_are_refused(weights: str):
    assert "vectors of two models must not mix" in refusal(f"model.weights={weights}")


def test_neither_predictions_nor_embeddings_is_nothing_to_write():
    assert refusal("output.predictions=false", "output.embeddings=false").startswith("output: set predictions or")


def test_missing_sections_and_keys_are_named():
    with pytest.raises(ConfigError) as caught:
        make_config({"input": {}})
    assert str(caught.value).splitlines() == [
        "input.url: missing, and there is no default",
        "output.url: missing, and there is no default",
    ]


def test_a_path_is_no_name_of_a_key():
    with pytest.raises(ConfigError, match=r"model.name: unknown key; .* stands in a section: model: \{name: …\}"):
        make_config({"input": {"url": "a"}, "output": {"url": "b"}, "model.name": "resnet18"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: {url: [}\n", "line 1, column 15"),
        ("input:\n\turl: x\n", "line 2, column 1"),
        ("input: {url: a}\ninput: {url: b}\n", "line 2, column 1: found duplicate key input"),
        ("- input\n- output\n", "must be a mapping with the sections input, model, output, runtime, storage"),
        ("just words", "just words: unknown key"),
        ("1: 2", "1: unknown key"),
        ("42", "cannot read the config"),
        (b"\x00\x01", "cannot read the config"),
        ("input: {url: é}".encode("latin-1"), "cannot read the config"),
        ("input: {url: '${x'}", "cannot read the config"),
        ("input: {url: '???'}\noutput: {url: b}", "cannot make out the config: input.url"),
        ("", "input.url: missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_sentence(text: str | bytes, message: str, tmp_path: Path):
    assert message in refusal_of(text, tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no config file .*nope.yaml. `resnet-batch init` writes one"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"is a folder, not a config file. To read its images: input.url="):
        load_config(tmp_path)


@pytest.mark.parametrize("word", ["model.name", "other.yaml", "=x", "input.url: x"])
def test_a_word_that_is_no_override(word: str):
    assert refusal(word).startswith("an override reads section.key=value, as in model.name=resnet18; got ")


# --- Overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("input.url=[a, 'b c']", "input.url", ["a", "b c"]),
        ("input.url='2024'", "input.url", "2024"),
        ('input.url="x=y"', "input.url", "x=y"),
        ("input.url=s3://b/a?b=c&d=e", "input.url", "s3://b/a?b=c&d=e"),
        ("input.url=*.tar", "input.url", "*.tar"),
        ("input.url=my images #1/*", "input.url", "my images #1/*"),
        ("input.url=a: b", "input.url", "a: b"),
        ("input.url=@here", "input.url", "@here"),
        ("input.url=2024-01-01", "input.url", "2024-01-01"),
        ("model.transform.resize=null", "model.transform.resize", None),
        ("model.transform.resize=~", "model.transform.resize", None),
        ("model.transform={resize: 32, crop: null}", "model.transform.crop", None),
        ("model.transform.mean=[0.5,0.5,0.5]", "model.transform.mean", [0.5, 0.5, 0.5]),
        ("output.predictions=false", "output.predictions", False),
        ("storage.deadline_s=5", "storage.deadline_s", 5.0),
        ("storage.options.client_kwargs.region_name=eu", "storage.options", {"client_kwargs": {"region_name": "eu"}}),
        ("runtime.actors=auto", "runtime.actors", "auto"),
        ("runtime.actors=2", "runtime.actors", 2),
    ],
)
def test_an_override_means_what_it_says(override: str, path: str, value: Any):
    found: Any = load(override)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_overrides_merge_mappings_replace_lists_and_the_last_wins(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "input: {url: [a, b, c]}\noutput: {url: o}\nmodel: {transform: {resize: 32, crop: 32}}\n"
        "storage: {options: {anon: true}}\n"
    )
    found = load_config(
        path,
        ["input.url=[z]", "model.transform={crop: null}", "storage.options.x=1", "output.top_k=3", "output.top_k=4"],
    )
    assert found.input.urls == ["z"]
    assert found.model.transform is not None
    assert (found.model.transform.resize, found.model.transform.crop) == (32, None)
    assert found.storage.options == {"anon": True, "x": 1}
    assert found.output.top_k == 4
    assert load_config(path, ["input.url.1=q"]).input.urls == ["a", "q", "c"]


def test_environment_variables_stand_in_values(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUCKET", "mine")
    assert load("input.url=s3://${oc.env:BUCKET}/x").input.url == "s3://mine/x"
    assert "'NOT_SET' not found" in refusal("input.url=${oc.env:NOT_SET}")


def test_a_section_of_its_own_overrides_storage_key_by_key():
    config = load(
        "storage={endpoint_url: 'http://one', options: {anon: true}, deadline_s: 7}",
        "input.storage={options: {requester_pays: true}}",
        "output.storage.endpoint_url=http://two",
    )
    common = {"endpoint_url": "http://one", "deadline_s": 7.0}
    assert config.input_storage == Storage(**common, options={"requester_pays": True})
    assert config.output_storage == Storage(endpoint_url="http://two", options={"anon": True}, deadline_s=7.0)
    assert load("storage.deadline_s=9").input_storage.deadline_s == 9


# --- Secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "storage.options={key: hunter2}",
        "storage.options.secret=hunter2",
        "storage.options.client_kwargs.aws_secret_access_key=hunter2",
        "storage.options.client_kwargs.aws_access_key_id=hunter2",
        "storage.options={a: [{session_token: hunter2}]}",
        "storage.options={credentials: {a: hunter2}}",
        "storage.options.sas=hunter2",
        "storage.options.connection_string=hunter2",
        "storage.options.s3_additional_kwargs.SSECustomerKey=hunter2",
        "storage.options.client_kwargs.headers.Authorization=hunter2",
        "storage.options.config_kwargs.proxies.https=http://user:hunter2@proxy",
        "input.storage.options.password=hunter2",
        "output.storage.options.account_key=hunter2",
        "storage.options=hunter2",
        "storage.optoins={secret: hunter2}",
        "storage.optoins=[{secret: hunter2}]",
        "storage.secret=hunter2",
        "storage.key=hunter2",
        "password=hunter2",
        "storage.endpoint_url=http://user:hunter2@host",
        "storage.endpoint_url=[http://user:hunter2@host]",
        "input.url=https://user:hunter2@host/x.tar",
        "input.url=https://hunter2@host/x.tar",
        "input.url=[a, 'https://user:hunter2@host/x.tar']",
        "output.url=s3://user:hunter2@bucket",
        "model.name=['https://user:hunter2@host']",
        "model.nme=https://host/x.pth?X-Amz-Signature=hunter2",
        "https://user:hunter2@host/config.yaml",
        "input.url=[https://user:hunter2@host",
    ],
)
def test_secrets_are_refused_and_never_shown(override: str):
    assert "hunter2" not in refusal(override)


def test_nor_by_the_constructor():
    with pytest.raises(ValidationError) as caught:
        JobConfig(input={"url": "a"}, output={"url": "b"}, storage={"options": {"secret": "hunter2"}})  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_what_only_sounds_like_a_secret_elsewhere_is_fine():
    assert load("input.key=product_id").input.key == "product_id"
    assert refusal("input.key=7") == "input.key: must be text; quote it to make it text (got 7)"
    assert load("input.url=s3://bucket/what@ever:1/x.tar").input.url == "s3://bucket/what@ever:1/x.tar"


def test_a_report_shows_no_secret():
    config = load("model.weights=https://user:hunter2@host/w.pth?Signature=hunter2", "input.url=s3://b/part-?.tar")
    shown = public_config(config)
    assert "hunter2" not in json.dumps(shown)
    assert shown["model"]["weights"] == "https://host/w.pth"
    assert shown["input"]["url"] == "s3://b/part-?.tar", "a wildcard is no query"


# --- Objects -------------------------------------------------------------------------------------------------------


def test_a_mapping_makes_a_config_by_the_constructor_too():
    data = {"input": {"url": "a"}, "output": {"url": "b"}, "model": {"transform": {"crop": None}}}
    assert JobConfig(**data) == make_config(data)  # type: ignore[arg-type]


def test_a_config_cannot_be_changed_and_survives_pickling_with_its_folder():
    config = load_config(ROOT / "configs" / "local.yaml")
    assert config.directory == ROOT / "configs"
    again = pickle.loads(pickle.dumps(config))
    assert (again, again.directory) == (config, config.directory)
    with pytest.raises(ValidationError, match="frozen"):
        config.model.name = "resnet18"  # type: ignore[misc]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_that_come_with_the_program_are_valid(path: Path):
    config = load_config(path)
    assert make_config(public_config(config)) == make_config(config.model_dump()), "what a report keeps is the config"


def test_the_template_is_valid_with_every_line_that_is_commented_out():
    """`# key: value  # what it is` becomes `key: value`, but for ellipses, which stand for what only the user knows."""
    lines = [re.sub(r"^( *)# ( *[a-z_0-9]+:)", r"\1\2", line) for line in TEMPLATE.read_text().splitlines()]
    text = "\n".join(line for line in lines if ": …" not in line)
    assert sum(a != b for a, b in zip(lines, TEMPLATE.read_text().splitlines(), strict=True)) >= 14
    config = make_config(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
    assert config.storage.shared
    assert config.model.transform is not None
    defaults = load_config(TEMPLATE)
    for section, name in (("input", "group_size"), ("input", "max_pixels"), ("output", "top_k"), ("runtime", "engine")):
        assert getattr(getattr(config, section), name) == getattr(getattr(defaults, section), name), "shows the default"
