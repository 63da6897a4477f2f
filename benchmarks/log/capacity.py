"""Op cycles per second of one server, and the bytes that it keeps for one op.

CPU-bound on the server's one thread where the disk groups its fsyncs well, else disk-bound. The
ceiling is the same number of bytes written with plain commands on the same server.
"""

from pathlib import Path

import redis

from log.cycles import Load, ops_per_second, run_ids, run_load
from log.figures import Part
from luthier_core import keys
from luthier_core.testing import running_valkey


def measure_throughput(disk: Path, num_rounds: int, num_clients: int = 2, repeats: int = 3) -> Part:
    part = Part(f"operations per second of one server, appendfsync always, best of {repeats}")
    plain, plain_cores = _best(
        disk, Load(kind="plain", num_rounds=num_rounds), num_clients, repeats
    )
    for kind, what in (
        ("library", "admit + commit + told"),
        ("service", "the same with the reads and the delivery record of the service"),
    ):
        load = Load(kind=kind, num_rounds=num_rounds)
        rate, cores = _best(disk, load, num_clients, repeats)
        part.row(f"{what}", f"{rate:,.0f} ops/s ({cores:.2f} cores busy)", f"{plain:,.0f} ops/s")
        part.figures |= {f"{kind}_ops_per_s": rate, f"{kind}_server_cores": cores}
    part.row("ceiling: XADD + HSET + HSET of the same bytes", f"{plain:,.0f} ops/s", "")
    part.figures |= {"plain_ops_per_s": plain, "plain_server_cores": plain_cores}
    num_runs = num_clients * load.num_sockets * load.runs_per_socket
    part.notes.append(
        f"{num_clients} client processes, {num_clients * load.num_sockets} sockets, "
        f"{num_runs} runs, {load.payload_bytes} B payloads, {load.result_bytes} B results; "
        "commands packed ahead"
    )
    return part


def _best(disk: Path, load: Load, num_clients: int, repeats: int) -> tuple[float, float]:
    """Of some runs on fresh servers: what else the machine does can only slow it down."""
    found = []
    for _ in range(repeats):
        with running_valkey(fsync="always", disk=disk) as url:
            load_library(url)
            found.append(ops_per_second(url, load, num_clients))
    return max(found)


def load_library(url: str) -> None:
    from importlib.resources import files

    source = files("luthier_core").joinpath("oplog.lua").read_text()
    with redis.Redis.from_url(url) as client:
        client.function_load(source, replace=True)


def measure_bytes(disk: Path, num_rounds: int) -> Part:
    """Bytes of memory per op that is neither trimmed nor expired."""
    load = Load(kind="library", num_sockets=8, runs_per_socket=4, num_rounds=num_rounds)
    num_runs = load.num_sockets * load.runs_per_socket
    with running_valkey(disk=disk) as url, redis.Redis.from_url(url) as client:
        load_library(url)
        empty = int(client.info("memory")["used_memory"])
        run_load(url, 0, load)
        client.client_kill_filter(skipme=True)  # their buffers are no part of what is kept
        total = int(client.info("memory")["used_memory"]) - empty
        parts = _by_key(client, num_runs, num_rounds)
    carried = load.payload_bytes + load.result_bytes
    part = Part("bytes in the server per retained op")
    for name, num_bytes in parts.items():
        part.row(name, f"{num_bytes:,.0f} B", "")
        part.figures[f"{name.split(',')[0].replace(' ', '_')}_bytes"] = num_bytes
    per_op = total / load.num_ops
    part.row("used_memory, all of it", f"{per_op:,.0f} B", f"{carried} B are payload and result")
    part.figures |= {"bytes_per_op": per_op, "payload_and_result_bytes": carried}
    part.notes.append(f"{load.num_ops:,} ops in {num_runs} runs, none trimmed")
    return part


def _by_key(client: redis.Redis, num_runs: int, num_rounds: int) -> dict[str, float]:
    def usage(names: list[str]) -> float:
        return sum(client.memory_usage(name, samples=0) or 0 for name in names)

    runs = run_ids(0, num_runs)
    num_ops = num_runs * num_rounds
    some = range(1, num_rounds + 1, 10)
    outcomes = [keys.run_outcome(run_id, seq) for run_id in runs for seq in some]
    return {
        "log entry, until trimmed": usage([keys.run_log(run_id) for run_id in runs]) / num_ops,
        "header fields, until trimmed": usage([keys.run_header(r) for r in runs]) / num_ops,
        "outcome, until it expires": usage(outcomes) / len(outcomes),
    }
