"""Imported by the process that ranks are forked from, before what they share: prepares it as a rank is prepared."""

import gc

gc.disable()  # all that this process does is to import, which leaves no garbage; a rank enables it again
from megatron_sr1.platform.runtime import prepare_process  # noqa: E402

prepare_process()
