"""Imported by the process that ranks are forked from, before anything else: prepares it as a rank is prepared."""

import gc

gc.disable()  # all that this process does is to import, which leaves no garbage; a rank enables it again
from megatron_sr1.parent_process import end_with_parent  # noqa: E402
from megatron_sr1.platform.runtime import prepare_process  # noqa: E402

end_with_parent()
prepare_process()
