"""torchrun with a rendezvous of ours: `python -m ddetr.launch.torchrun OPTION... -- train TRAIN_ARGUMENT...`.

The options are torchrun's own, the arguments reach every rank as they are. The ranks of a single node meet on loopback,
those of several at --master-addr, with --node-rank, or, with --rdzv-backend c10d, at --rdzv-endpoint.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from ..core.training.network import LOOPBACK, address_towards, own_address
from ..data.shared_memory import FOLDER, REMEDY
from . import rendezvous
from .command_line import split_off
from .console import paragraph


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """torchrun's options with our rendezvous in the place of the one they name, and this node's own address.

    Raises ValueError for a rendezvous that is not one of torch's two, OSError when the place to meet cannot be reached.
    """
    _, most = parse_min_max_nnodes(options.nnodes)
    numbered = options.rdzv_backend == "static"
    if not numbered and options.rdzv_backend not in ("c10d", rendezvous.NAME):
        raise ValueError(f"--rdzv-backend {options.rdzv_backend}: nodes meet by static (--node-rank) or c10d")
    conf = [options.rdzv_conf] if options.rdzv_conf else []
    if options.standalone or most == 1:
        options.rdzv_endpoint, options.local_addr = f"{LOOPBACK}:0", LOOPBACK
        conf.append("rank=0")
    else:
        given = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port or rendezvous.DEFAULT_PORT}"
        options.rdzv_endpoint = given
        if numbered:
            if options.max_restarts:
                raise ValueError(
                    "--max-restarts is for nodes that come and go: leave out --node-rank, or restart by hand"
                )
            conf.append(f"rank={options.node_rank}")
        else:
            host, _ = parse_rendezvous_endpoint(given, rendezvous.DEFAULT_PORT)
            # torchrun takes the name of this machine, which others may not know.
            options.local_addr = (
                options.local_addr or own_address(host, rendezvous.NAME_SECONDS) or address_towards(host)
            )
    options.rdzv_conf = ",".join(conf)
    options.rdzv_backend, options.standalone, options.node_rank = rendezvous.NAME, False, 0
    return options


@record
def launch(arguments: Sequence[str]) -> None:
    """`torchrun ARGUMENT...` with our rendezvous.

    Raises what `settled` raises, and ChildFailedError when a rank has failed. A signal to stop is passed on to the
    ranks; when they have ended, or were killed for taking too long, SignalException is raised.
    """
    rendezvous.register()
    run(settled(parse_args(arguments)))


def failure(failed: ChildFailedError) -> tuple[str, int]:
    """What to say of the ranks of this node that have failed, and the exit status: TRY_AGAIN if all of them are well.

    What a rank has to say of its failure it has said itself.
    """
    from ..core.training.heartbeat import TRY_AGAIN  # with all that ranks import, which their launcher does not need

    ranks: dict[int, list[str]] = {}
    for rank, one in sorted(failed.failures.items()):
        ranks.setdefault(one.exitcode, []).append(f"{rank} (pid {one.pid})")
    if ranks.keys() == {TRY_AGAIN}:
        return f"rank {', '.join(ranks[TRY_AGAIN])} ended because other ranks did: started again, it goes on", TRY_AGAIN
    said = [f"rank {', '.join(those)} {_how(exit_code)}" for exit_code, those in ranks.items()]
    remedy = f". {FOLDER} was full, perhaps. {REMEDY}" if -signal.SIGBUS in ranks else ""
    return f"{'; '.join(said)}. What they said stands above{remedy}", 1


def _how(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit status {exit_code}"


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until torchrun has ranks to tell, Ctrl-C ends it like SIGTERM does, also while it waits for other nodes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        options, word = split_off(sys.argv[1:])
        launch([*options, "--module", "ddetr.launch.command_line", word])
    except SignalException as stopped:
        name = signal.Signals(stopped.sigval).name
        print(f"torchrun: {name}: the ranks of this node were told, and have ended", file=sys.stderr)
        sys.exit(128 + stopped.sigval)  # as a shell has it: not 0, the run is not finished
    except ChildFailedError as failed:
        said, status = failure(failed)
        print(f"torchrun: {said}", file=sys.stderr)
        sys.exit(status)
    except (ValueError, OSError) as error:
        print(f"torchrun: {paragraph(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (RendezvousConnectionError, RendezvousStateError) as error:
        sys.exit(f"torchrun: {error}")


if __name__ == "__main__":
    main()
