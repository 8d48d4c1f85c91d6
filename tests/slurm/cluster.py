"""A real Slurm cluster of several nodes on this one machine, for tests: ``python -m tests.slurm.cluster up DIR``.

One controller and one `slurmd` a node. A node is a network namespace with its own address and host name, so `sbatch`,
`srun`, signals, requeue and rendezvous over the network are the real ones; only the file system is shared, as it would
be on a cluster. It needs root and Debian's packages ``slurm-wlm munge iproute2``. Nothing outside `DIR` is written, but
for network names that begin with ``nlslurm``; `down` ends what `up` started and nothing else.
"""

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "unshare", "nsenter")
_ADMIN_PATH = "/usr/sbin:/sbin"
_SLOTS = 20
_START_SECONDS = 30.0
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")


def what_is_missing() -> str | None:
    """Why no cluster can be started here, or None."""
    path = f"{os.environ['PATH']}:{_ADMIN_PATH}"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "namespaces and Slurm's daemons need root"
    # A container without the right to make networks; the link goes with the namespace that it is made in.
    trial = "unshare --net --mount --uts ip link add trial type bridge && ip netns list"
    done = subprocess.run(["bash", "-c", trial], capture_output=True, text=True, check=False, env={"PATH": path})
    return None if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


class Cluster:
    """The cluster whose state lies in `folder`; as a context manager it is up inside the block.

    Args:
        containers: let srun and sbatch know pyxis' options (rootfs_plugin.c; needs gcc and ``libslurm-dev``).
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cpus: int = 8, containers: bool = False):
        self.containers = containers
        self.folder = folder.resolve()
        self.num_nodes = num_nodes
        self.cpus = cpus
        self.slot = -1
        self.munge = Path()
        self._pids: dict[str, int] = {}
        self._state = self.folder / "cluster.json"

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{kept['PATH']}:{_ADMIN_PATH}"}

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- up and down

    def up(self) -> None:
        """Start the daemons and wait until every node is idle.

        Raises:
            RuntimeError: a daemon ended or a node did not come; the message has its log.
        """
        for name in ("ctld", "spool", "log", "etc"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munge wants every folder above its socket to be open to all, which a test's own folder is not.
        self.munge = Path(tempfile.mkdtemp(prefix="nlslurm_munge_"))
        self.munge.chmod(0o755)
        try:
            self._make_network()
            self._write_files()
            munge = self.munge
            self._start(
                "munged", "munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket",
                f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={self.folder}/log/munged.log",
            )  # fmt: skip
            self._until(lambda: (munge / "socket").exists(), "munged made no socket")
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in self.nodes:
                self.start_node(node, wait=False)
            self._until(lambda: len(self.idle_nodes()) == self.num_nodes, "not every node is idle")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Cancel the jobs, end the daemons, remove the network. A second call does nothing."""
        if self._state.exists():
            saved = json.loads(self._state.read_text())
            self.slot, self._pids, self.munge = saved["slot"], saved["pids"], Path(saved["munge"])
        if "slurmctld" in self._pids and self.alive("slurmctld"):
            with contextlib.suppress(subprocess.SubprocessError):
                self.command("scancel", "--user=root", check=False, timeout=10)
        for number in range(1, self.num_nodes + 1):
            self._kill_processes_of(number)
        for name in ("slurmctld", "munged"):
            if self.alive(name):
                os.kill(self._pids[name], signal.SIGKILL)
        for number in range(1, self.num_nodes + 1):
            _quiet("ip", "netns", "del", self._namespace(number))
        _quiet("ip", "link", "del", self._bridge)
        self._pids = {}
        if self.munge.name.startswith("nlslurm_munge_"):
            shutil.rmtree(self.munge, ignore_errors=True)
        self._state.unlink(missing_ok=True)

    def alive(self, name: str) -> bool:
        """True while the daemon `name` (``slurmctld``, ``munged``, a node) runs."""
        try:
            state = Path(f"/proc/{self._pids[name]}/stat").read_text().rpartition(") ")[2][0]
        except (OSError, KeyError):
            return False
        return state not in "ZX"

    # ---- nodes

    def start_node(self, node: str, wait: bool = True) -> None:
        """Start a node's `slurmd`, also after `kill_node`; optionally wait until the controller sees it."""
        etc = self.folder / "etc"
        number = int(node.removeprefix("node"))
        script = (
            f"mount --bind {etc}/hosts /etc/hosts && mount --bind {etc}/nsswitch.conf /etc/nsswitch.conf && "
            f"hostname {node} && exec slurmd -D -f {self.folder}/slurm.conf -N {node}"
        )
        inside = ("nsenter", f"--net=/run/netns/{self._namespace(number)}", "unshare", "--mount", "--uts")
        self._start(node, *inside, "bash", "-c", script)
        if wait:
            self._until(lambda: node in self.idle_nodes(), f"{node} does not come back")

    def kill_node(self, node: str) -> None:
        """As if its power had failed: every process of the node ends at once, `slurmd` and job alike."""
        self._kill_processes_of(int(node.removeprefix("node")))

    def kill_slurmd(self, node: str) -> None:
        """End the node's daemon alone; the processes of its jobs go on, out of the controller's sight."""
        os.kill(self._pids[node], signal.SIGKILL)

    def on_node(self, node: str, *command: str) -> None:
        """Run `command` among the node's own mounts, network and host name."""
        inside = ("nsenter", f"--target={self._pids[node]}", "--mount", "--net", "--uts")
        subprocess.run([*inside, *command], env=self.environment, check=True, capture_output=True)

    def processes_of(self, node: str) -> list[int]:
        """Ids of all processes on `node`."""
        found = _quiet("ip", "netns", "pids", self._namespace(int(node.removeprefix("node"))))
        return [int(pid) for pid in found.split()]

    def ranks(self) -> list[int]:
        """Ids of the training processes on all nodes."""
        found = []
        for node in self.nodes:
            for pid in self.processes_of(node):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if b"nemo_llm.train" in words and b"python" in os.path.basename(words[0]):
                        found.append(pid)
        return found

    def idle_nodes(self) -> list[str]:
        shown = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False)
        return [line.split()[0] for line in shown.splitlines() if line.split()[1:] == ["idle"]]

    # ---- jobs

    def command(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Output of a command that a user of the cluster types.

        Raises:
            RuntimeError: `check` is set and it ended with another code than 0.
        """
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a mapping."""
        for _ in range(5):  # once in some thousand calls scontrol dies of SIGPIPE on a loaded machine
            if shown := self.command("scontrol", "show", "job", "-o", job_id, check=False):
                break
            time.sleep(1)
        words = (shown or self.command("scontrol", "show", "job", "-o", job_id)).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait(self, job_id: str, states: Sequence[str] = FINAL_STATES, timeout: float = 120) -> dict[str, str]:
        """The job, once it is in one of `states`.

        Raises:
            TimeoutError: it did not get there.
        """
        until = time.monotonic() + timeout
        while (found := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > until:
                raise TimeoutError(f"job {job_id} is {found['JobState']} ({found['Reason']}) after {timeout} s")
            time.sleep(0.2)
        return found

    # ---- parts

    @property
    def _bridge(self) -> str:
        return f"nlslurm{self.slot}"

    def _namespace(self, number: int) -> str:
        return f"nlslurm{self.slot}-node{number}"

    def _address(self, number: int) -> str:
        return f"10.214.{self.slot}.{10 + number}"

    def _make_network(self) -> None:
        """A bridge, and a namespace with one end of a cable to it for each node."""
        for self.slot in range(_SLOTS):
            made = subprocess.run(
                ["ip", "link", "add", self._bridge, "type", "bridge"], capture_output=True, check=False
            )
            if made.returncode == 0:
                break
        else:
            raise RuntimeError("no bridge can be made here: network namespaces need root and CAP_NET_ADMIN")
        self._save()
        _ip("addr", "add", f"10.214.{self.slot}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for number in range(1, self.num_nodes + 1):
            space, cable = self._namespace(number), f"{self._bridge}.{number}"
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", f"{self._address(number)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _write_files(self) -> None:
        key = self.munge / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = os.uname().nodename.partition(".")[0]
        hosts = ["127.0.0.1 localhost", f"10.214.{self.slot}.1 {host}"]
        hosts += [f"{self._address(number)} node{number}" for number in range(1, self.num_nodes + 1)]
        (self.folder / "etc/hosts").write_text("\n".join(hosts) + "\n")
        # No name server is reachable from a node: ask none, which would cost ten seconds a name.
        (self.folder / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for number in range(1, self.num_nodes + 1):
            (self.folder / f"spool/node{number}").mkdir(exist_ok=True)
        text = _slurm_conf(self, host)
        if self.containers:
            plugin, stack = self.folder / "rootfs_plugin.so", self.folder / "plugstack.conf"
            source = Path(__file__).with_name("rootfs_plugin.c")
            subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", plugin, source], check=True)
            stack.write_text(f"required {plugin}\n")
            text += f"PlugStackConfig={stack}\n"
        (self.folder / "slurm.conf").write_text(text)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"log/{name}.out").open("ab") as output:
            started = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self._pids[name] = started.pid
        self._save()

    def _save(self) -> None:
        state = {"slot": self.slot, "pids": self._pids, "nodes": self.num_nodes, "munge": str(self.munge)}
        self._state.write_text(json.dumps(state))

    def _kill_processes_of(self, number: int) -> None:
        for _ in range(50):  # a process may start another one while they are counted
            found = self.processes_of(f"node{number}") if self.slot >= 0 else []
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                return
            time.sleep(0.02)

    def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        until = time.monotonic() + _START_SECONDS
        while not condition():
            for name in self._pids:
                if not self.alive(name):
                    raise RuntimeError(f"{name} ended: {(self.folder / f'log/{name}.out').read_text()[-2000:]}")
            if time.monotonic() > until:
                raise RuntimeError(f"{complaint} after {_START_SECONDS:g} s; logs: {self.folder}/log")
            time.sleep(0.05)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _quiet(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _slurm_conf(cluster: Cluster, host: str) -> str:
    folder, slot = cluster.folder, cluster.slot
    nodes = "\n".join(
        f"NodeName=node{number} NodeAddr={cluster._address(number)} Port={17002 + 40 * slot} "
        f"CPUs={cluster.cpus} RealMemory=8192 State=UNKNOWN"
        for number in range(1, cluster.num_nodes + 1)
    )
    return f"""ClusterName=nlslurm{slot}
SlurmctldHost={host}(10.214.{slot}.1)
SlurmctldPort={17001 + 40 * slot}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only when its old credential has expired (120 s when unset).
AuthInfo=socket={cluster.munge}/socket,cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock: one heavy cluster at a time on a small machine."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    if reason := what_is_missing():
        print(reason, file=sys.stderr)
        return 2
    cluster = Cluster(arguments.folder, arguments.nodes)
    if arguments.action == "down":
        if cluster._state.exists():
            cluster.num_nodes = json.loads(cluster._state.read_text())["nodes"]
        cluster.down()
        return 0
    cluster.up()
    print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
