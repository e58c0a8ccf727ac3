"""What a second run asks of the store, counted on the line between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

import pipeline
from pipeline.errors import ExitCode
from tests.support.arena import start_run
from tests.support.jobs import digits_config, digits_tars
from tests.support.relay import relay
from tests.support.s3 import s3_server


@pytest.mark.usefixtures("ray_cluster")
def test_finished_shards_are_not_opened(tmp_path: Path):
    paths = digits_tars(tmp_path / "shards", 6, 20)
    with s3_server(for_all=True) as s3, relay(s3.endpoint_url) as line:
        client = s3.client(s3.owner)
        storage = {"endpoint_url": line.url, "options": {"anon": True}}
        address = {"address": ray.get_runtime_context().gcs_address}
        config = digits_config("s3://raw/digits/*.tar", "s3://labels/out", storage=storage, runtime=address)

        def upload(path: Path) -> None:
            client.put_object(Bucket="raw", Key=f"digits/{path.name}", Body=path.read_bytes())

        def asked() -> set[tuple[str, str]]:
            requests = (request.split(" ")[:2] for request in line.asked)
            return {(method, path) for method, path in requests if path.endswith(".tar")}

        def run() -> set[tuple[str, str]]:
            """A run in a process of its own, which remembers nothing; method and path of what it asked, input shards only."""
            line.asked.clear()
            assert start_run(config, tmp_path).wait(200) == ExitCode.COMPLETE, (tmp_path / "driver.log").read_text()
            return asked()

        for path in paths[:4]:
            upload(path)
        assert pipeline.run(config).exit_code == ExitCode.COMPLETE
        opened = {path for method, path in asked() if method == "GET"}
        assert opened == {f"/raw/digits/{p.name}" for p in paths[:4]}

        upload(paths[4])
        paths[1].write_bytes(paths[5].read_bytes())
        upload(paths[1])
        expected = {f"/raw/digits/{paths[4].name}", f"/raw/digits/{paths[1].name}"}
        assert {path for _, path in run()} == expected, "finished shards are neither opened nor looked up"

        assert run() == set()
        methods = {request.split(" ")[0] for request in line.asked}
        assert "GET" in methods
        assert not any(".parquet" in request for request in line.asked), "nor is a part"
        assert len(line.asked) <= 12, line.asked
