"""What nobody may bring in: calls that run data as code, files that shards point at, secrets in what is submitted.

Other guards are tested where they stand: docs/security.md names them all, and each name is checked here.
"""

from __future__ import annotations

import ast
import functools
import http.server
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import pipeline
from pipeline import submission
from pipeline.config import Input, Transform, load_config, make_config
from pipeline.errors import ConfigError, FatalError, Reject
from pipeline.inputs.images import decode
from pipeline.inputs.readers import read
from pipeline.inputs.shards import discover
from pipeline.rows import Row
from pipeline.storage import Store
from pipeline.submission import ENTRYPOINT, pack
from tests.support.jobs import digits_config
from tests.support.tars import member, tar
from tests.support.web import serving

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "security.md"
SECRET = b"\x89PNG not ours"
PNG = b"\x89PNG\r\n"


# --- Data is never code --------------------------------------------------------------------------------------------

# By the end of a call's dotted name: what it must be given, or None for what is never called.
BUILTINS = ("eval", "exec", "__import__")
RISKY: dict[str, dict[str, object] | None] = {
    "os.system": None,
    "os.popen": None,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "cloudpickle.load": None,
    "cloudpickle.loads": None,
    "marshal.loads": None,
    "shelve.open": None,
    "joblib.load": None,
    "pd.read_pickle": None,
    "hub.load": None,
    "jit.load": None,
    "torch.load": {"weights_only": True},
    "get_state_dict": {"weights_only": True},
    "load_state_dict_from_url": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "yaml.load": None,
    "yaml.load_all": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "extract": None,
    "extractall": None,
    "unpack_archive": None,
    "mktemp": None,
}
FORBIDDEN_MODULES = ("pickle", "marshal", "shelve", "dill", "joblib", "torchvision.io", "torch.package")
MAY_IMPORT = {
    "pipeline/model/weights.py": {"pickle"},  # it names pickle's error
    "pipeline/nvjpeg.py": {"torchvision.io"},  # for JPEGs whose header was checked, where a user asks for it
}
MAY_OPEN_ANY_IMAGE = re.compile(r"(benchmarks|scripts|pipeline/examples)/")  # which open their own


def sources() -> list[Path]:
    folders = ("pipeline", "jobs", "infra", "scripts", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def risks(text: str, name: str) -> Iterator[str]:
    """Each call and import in a source that could run data as code or write where data says."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield from _risks_of_call(node, name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{imported}" for imported in names] + [str(node.module)]
            for imported in names:
                known = next((m for m in FORBIDDEN_MODULES if f"{imported}.".startswith(f"{m}.")), None)
                if known and known not in MAY_IMPORT.get(name, ()):
                    yield f"{name}:{node.lineno} imports {imported}"


def _risks_of_call(node: ast.Call, name: str) -> Iterator[str]:
    called = dotted(node.func)
    given = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
    if called in BUILTINS:
        yield f"{name}:{node.lineno} calls {called}"
    for risky, needs in RISKY.items():
        if f".{called}".endswith(f".{risky}") and (needs is None or not needs.items() <= given.items()):
            yield f"{name}:{node.lineno} calls {called}"
    if given.get("shell") is True:
        yield f"{name}:{node.lineno} calls {called} with a shell"
    keywords = {keyword.arg for keyword in node.keywords}
    if called == "Image.open" and "formats" not in keywords and not MAY_OPEN_ANY_IMAGE.match(name):
        yield f"{name}:{node.lineno} opens an image of any format"


def test_no_source_runs_data_as_code():
    paths = sources()
    assert len(paths) > 50
    assert [r for path in paths for r in risks(path.read_text(), path.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "import pickle",
        "from pickle import loads",
        "from torchvision.io import decode_jpeg",
        "from torchvision import io",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "tar.extractall(folder)",
        "tarfile.open(x).extract(member)",
        "subprocess.run(command, shell=True)",
        "Image.open(path)",
        "PIL.Image.open(path); os.system('ls')",
        "weights.get_state_dict(progress=False)",
    ],
)
def test_the_search_finds(line: str):
    assert len(list(risks(line, "pipeline/x.py"))) >= 1


def test_the_search_lets_pass():
    fine = (
        "torch.load(f, weights_only=True); np.load(f, allow_pickle=False); Image.open(f, formats=F); yaml.safe_load(t)"
    )
    assert list(risks(fine, "pipeline/x.py")) == []


def test_ghostscript_and_other_parsers_are_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    """Whatever Pillow has registered in this process, untrusted bytes reach the named formats only."""
    from PIL import EpsImagePlugin

    Image.preinit()
    Image.init()
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", _never)
    transform = Transform(resize=8, crop=8)
    for kind in ("EPS", "PCX", "TGA", "ICO", "PPM", "SGI", "IM", "JPEG2000", "DDS", "ICNS", "PDF"):
        if kind in Image.SAVE:
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16)).save(buffer, kind)
            with pytest.raises(Reject) as caught:
                decode(buffer.getvalue(), transform, 10**6)
            assert caught.value.error in ("not_an_image", "unsupported_format"), kind


def _never(*arguments: object, **options: object) -> None:
    raise AssertionError("this must not be reached")


# --- Shards point nowhere ------------------------------------------------------------------------------------------


def samples(shard: Path, **options: Any) -> list[Row]:
    config = Input(url=str(shard), **options)
    (found,) = discover(config, Store())
    return list(read(found, config, Store()))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file beside the input that no shard may show."""
    path = tmp_path / "private" / "secret.png"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


def test_a_tar_shows_no_file_and_writes_none(tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shard = tmp_path / "evil.tar"
    names = [f"{tmp_path}/out/absolute.png", "../up.png", "a/../../../up.png", "~/home.png"]
    links = [
        member("link.png", kind=tarfile.SYMTYPE, link=str(secret)),
        member("hard.png", kind=tarfile.LNKTYPE, link="/etc/passwd"),
        member("up.png", kind=tarfile.LNKTYPE, link="../private/secret.png"),
    ]
    shard.write_bytes(tar(*links, *((name, PNG) for name in names)))
    found = samples(shard)
    assert len(found) == 7
    assert all(sample.data in (PNG, None) for sample in found)
    assert [sample.reject.error for sample in found if sample.reject] == ["not_a_regular_member"] * 3
    shard.unlink()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before
    assert set(tmp_path.rglob("*")) == set(before)


def test_a_path_in_a_parquet_file_is_a_name_and_nothing_more(tmp_path: Path, secret: Path):
    images = [{"bytes": None, "path": str(secret)}, {"bytes": PNG, "path": str(secret)}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    found = samples(tmp_path / "a.parquet")
    assert [(sample.key, sample.data) for sample in found] == [(str(secret), None), (str(secret), PNG), ("2", None)]
    assert [sample.reject and sample.reject.error for sample in found] == ["null_image", None, "null_image"]


def test_links_in_a_folder_are_followed_as_documented(tmp_path: Path, secret: Path):
    """A folder is its owner's: whoever may put links into it says what is read. Only image names count."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "linked.png").symlink_to(secret)
    (folder / "passwords.db").symlink_to(secret)
    (folder / "more").symlink_to(secret.parent)
    (folder / "dangling.png").symlink_to(tmp_path / "nothing")
    assert [(sample.key, sample.data) for sample in samples(folder)] == [
        ("linked.png", SECRET),
        ("more/secret.png", SECRET),
    ]
    assert "Links in a local folder are followed" in DOC.read_text()


def test_a_pipe_or_device_in_a_folder_is_passed_over(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "a.png").write_bytes(PNG)
    assert stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)
    (found,) = discover(Input(url=str(tmp_path)), Store())
    assert [member.url.rpartition("/")[2] for member in found.members] == ["a.png"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_a_list_from_afar_names_no_local_file(tmp_path: Path, secret: Path):
    """Whoever writes it could have this machine's files read, and their hashes written."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        for line in (str(secret), f"file://{secret}", "~/secret.png", f"local://{secret}"):
            (tmp_path / "list.txt").write_text(f"{line}\n")
            with pytest.raises(ConfigError, match="is not on this machine, but names a file that is"):
                discover(Input(url=f"http://127.0.0.1:{server.server_port}/list.txt"), Store())
            assert discover(Input(url=str(tmp_path / "list.txt"), allow_empty=True), Store()) or line[0] == "~"


# --- What is submitted ---------------------------------------------------------------------------------------------


def plant(folder: Path, *names: str) -> None:
    """Files that nobody may see."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("PLANTED")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config, a custom network, and what should never leave the machine."""
    folder = tmp_path / "project"
    plant(folder, ".env", ".aws/credentials", "id_rsa", "secrets.yaml", "key.pem", "data/a.tar", "net.pth", ".x.py")
    plant(folder, ".hidden/x.py")
    (folder / "mine.py").write_text("import helper\ndef build(): ...\n")
    (folder / "helper.py").write_text("")
    config = digits_config("s3://raw/*.tar", "s3://labels/x")
    config["model"] |= {"name": "mine:build", "weights": "s3://models/net.pth", "classes": ["a", "${oc.env:HOME}"]}
    (folder / "job.yaml").write_text(yaml.safe_dump(config).replace("${", "\\\\${"))
    return folder


def test_only_what_the_job_needs_is_submitted(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "program" / "pipeline"
    program.mkdir(parents=True)
    ours = Path(submission.__file__).parent
    for name in ("submission.py", "template.yaml", "inputs/shards.py", "examples/digits_resnet20.safetensors"):
        (program / name).parent.mkdir(exist_ok=True)
        (program / name).write_bytes((ours / name).read_bytes())
    plant(program, ".env", "secret.txt", "inputs/.aws/credentials", "__pycache__/x.pyc", "model.pth", "#shards.py#")
    plant(program, ".x.py")
    monkeypatch.setattr(submission, "__file__", str(program / "submission.py"))
    folder = tmp_path / "packed"
    folder.mkdir()
    pack(load_config(project / "job.yaml"), folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *("config.yaml", "mine.py", "helper.py", "pipeline/submission.py", "pipeline/template.yaml"),
        *("pipeline/inputs/shards.py", "pipeline/examples/digits_resnet20.safetensors"),
    }


def test_everything_that_the_program_needs_is_submitted(tmp_path: Path):
    config = make_config(digits_config("s3://raw/*.tar", "s3://labels/x"))
    pack(config, tmp_path)
    ours = ROOT / "pipeline"
    files = {path.relative_to(ours) for path in ours.rglob("*") if path.is_file() and path.suffix in (".py", ".yaml")}
    assert files <= {path.relative_to(tmp_path / "pipeline") for path in (tmp_path / "pipeline").rglob("*")}


def test_a_name_of_a_class_reads_no_environment(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THEIRS", "PLANTED")
    names = ["a", "${oc.env:THEIRS}", r"\${oc.env:THEIRS}", "a${", "$", r"x\y", r"\\${b} \ "]
    (project / "names.json").write_text(json.dumps(names))
    pack(load_config(project / "job.yaml", ["model.classes=names.json"]), tmp_path)
    assert "PLANTED" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml").model.classes == names


@pytest.mark.parametrize("url", ["https://me:PLANTED@host/net.pth", "https://host/net.pth?X-Amz-Signature=PLANTED"])
def test_weights_behind_a_secret_are_not_submitted(url: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="https://host/net.pth comes with a password or a signature") as caught:
        pack(make_config(digits_config("s3://r/*.tar", "s3://l/x", model={"weights": url})), tmp_path)
    assert "PLANTED" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_started_with_no_secret_in_its_environment(monkeypatch: pytest.MonkeyPatch):
    """env_vars and the entrypoint stand in plain text in Ray's job records and logs."""
    sent: dict[str, Any] = {}

    class Client:
        def submit_job(self, **arguments: Any) -> str:
            sent.update(arguments)
            return "job"

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    monkeypatch.setattr(submission, "_client", lambda address: Client())
    config = make_config(digits_config("s3://raw/*.tar", "s3://labels/x"))
    assert submission.submit_job(config, "http://me:PLANTED@head", wait=False, submission_id=None) == "job"
    assert sent["entrypoint"] == ENTRYPOINT
    assert sent["runtime_env"].keys() == {"working_dir", "env_vars"}
    assert sent["runtime_env"]["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S"}
    assert "PLANTED" not in repr(sent)


def test_the_address_of_a_cluster_is_shown_without_its_password(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(FatalError, match=r"cannot submit to the Ray dashboard at http://127.0.0.1:9") as caught:
        pipeline.submit(digits_config("s3://raw/*.tar", "s3://labels/x"), "http://me:PLANTED@127.0.0.1:9")
    assert "PLANTED" not in str(caught.value) + "".join(capsys.readouterr())


# --- The page ------------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", DOC.read_text()))
    assert len(named) > 10
    for path, test in named:
        assert (ROOT / path).is_file(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
