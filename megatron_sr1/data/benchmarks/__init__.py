"""Public benchmarks in the layout of their authors -> samples: one converter each, and the table of all of them."""

from collections.abc import Mapping

from megatron_sr1.data.benchmarks.benchmark import Benchmark
from megatron_sr1.data.benchmarks.files import open_benchmark
from megatron_sr1.data.benchmarks.hallucination import AMBER_LABELS, amber, hallusionbench, pope
from megatron_sr1.data.benchmarks.language import gsm8k, math_500, mmlu_pro, supergpqa
from megatron_sr1.data.benchmarks.mathematics import math_vision, mathverse
from megatron_sr1.data.benchmarks.mmmu import NUM_IMAGES, mmmu, mmmu_pro_vision
from megatron_sr1.data.benchmarks.perception import realworldqa, visnumbench


def _all(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


_MMMU = _all("id", "question", "options", "answer", *(f"image_{number}" for number in range(1, NUM_IMAGES + 1)))
_MATHVERSE = _all("sample_index", "problem_version", "question", "answer", "question_type")
_MATH_VISION = (*_all("id", "question", "options", "answer", "subject"), ("decoded_image", "image"))
_VISNUM = (("question", "text"), ("option",), ("answer",), ("image", "image_path"), ("Attributes", "Major_categories"))
_POPE = (("question", "text"), ("answer", "label"), *_all("question_id", "category", "image"))
_AMBER = _all("id", "image", "query", "type", "truth")
_HALLUSION = _all(
    "category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer"
)
_MMLU_PRO = _all("question_id", "question", "options", "answer", "category")
_SUPERGPQA = _all("uuid", "question", "options", "answer_letter", "discipline")

_PRO, _AMBER_SET = "MMMU/MMMU_Pro", "junyangwang0410/AMBER"
BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mmmu", "MMMU/MMMU", (*_MMMU, ("question_type",)), mmmu, "validation"),
        Benchmark("mmmu-pro-10", _PRO, _MMMU, mmmu, "test", "standard (10 options)"),
        Benchmark("mmmu-pro-4", _PRO, _MMMU, mmmu, "test", "standard (4 options)"),
        Benchmark("mmmu-pro-vision", _PRO, _all("id", "image", "options", "answer"), mmmu_pro_vision, "test", "vision"),
        Benchmark("mathverse", "AI4Math/MathVerse", _MATHVERSE, mathverse, "testmini"),
        Benchmark("math-vision", "MathLLMs/MathVision", _MATH_VISION, math_vision, "test"),
        Benchmark("realworldqa", "xai-org/RealworldQA", _all("image", "question", "answer"), realworldqa, "test"),
        Benchmark("visnumbench", "GML-FMGroup/VisNumBench", _VISNUM, visnumbench),
        Benchmark("pope", "lmms-lab/POPE", _POPE, pope, "test"),
        Benchmark("amber", _AMBER_SET, _AMBER, amber, "query_discriminative.json", labels=AMBER_LABELS),
        Benchmark("hallusionbench", "tianyi-lab/HallusionBench", _HALLUSION, hallusionbench),
        Benchmark("gsm8k", "openai/gsm8k", _all("question", "answer"), gsm8k, "test", "main"),
        Benchmark("math-500", "HuggingFaceH4/MATH-500", _all("problem", "answer", "unique_id"), math_500, "test"),
        Benchmark("mmlu-pro", "TIGER-Lab/MMLU-Pro", _MMLU_PRO, mmlu_pro, "test"),
        Benchmark("supergpqa", "m-a-p/SuperGPQA", _SUPERGPQA, supergpqa),
    )
}

__all__ = ["BENCHMARKS", "Benchmark", "open_benchmark"]
