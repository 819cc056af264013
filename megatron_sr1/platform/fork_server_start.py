"""Imported by the process that ranks are forked from, before anything else: prepares it as a rank is prepared."""

from megatron_sr1.platform.fork_server import end_with_parent
from megatron_sr1.platform.runtime import prepare_process

end_with_parent()
prepare_process()
