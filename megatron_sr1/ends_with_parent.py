"""Imported for its effect by a process that is only told what to import, before all else that takes time."""

from megatron_sr1.parent_process import end_with_named_parent

end_with_named_parent()
