"""The registered data sets: data only. Names, paths, splits and columns are those of nvidia-modelopt 0.47's dataset_utils."""
from dataclasses import dataclass


@dataclass(frozen=True)
class HubDataset:
    """One data set of the Hugging Face hub, and which of its columns make a sample's text (joined by newlines; a column that holds
    a list of chat turns counts as their contents)."""
    path: str
    columns: tuple[str, ...]
    name: str | None = None
    splits: tuple[str, ...] = ("train",)
    chat_key: str | None = None       # the column that a chat template can be applied to
    data_files: str | None = None     # read these raw files as JSON instead: the declared schema does not match them


def _chat(path: str, *splits: str, **more) -> HubDataset:
    return HubDataset(path, ("messages",), splits=splits, chat_key="messages", **more)


_LANGUAGES = ("de", "es", "fr", "it", "ja", "zh")

HUB_DATASETS: dict[str, HubDataset] = {
    "cnn_dailymail": HubDataset("abisee/cnn_dailymail", ("article",), name="3.0.0"),
    "pile": HubDataset("monology/pile-uncopyrighted", ("text",), name="v1.0"),
    "pg19": HubDataset("pg19", ("text",), name="v1.0"),
    "wikipedia": HubDataset("wikipedia", ("text",), name="20220301.en"),
    "c4": HubDataset("c4", ("text",), name="en"),
    "wikitext": HubDataset("Salesforce/wikitext", ("text",), name="wikitext-103-v1"),
    "magpie": HubDataset("Magpie-Align/Magpie-Pro-MT-300K-v0.1", ("conversations",), chat_key="conversations"),
    "open_code_reasoning": HubDataset("nvidia/OpenCodeReasoning", ("input", "output"), name="split_0", splits=("split_0",)),
    "open_math_reasoning": HubDataset("nvidia/OpenMathReasoning", ("problem", "generated_solution"), splits=("cot", "tir", "genselect")),
    "llama-nemotron-post-training-dataset": HubDataset("nvidia/Llama-Nemotron-Post-Training-Dataset", ("input", "output"), name="SFT",
                                                       splits=("code", "math", "science", "chat", "safety")),
    "nemotron-post-training-dataset-v1": _chat("nvidia/Nemotron-Post-Training-Dataset-v1", "stem", "chat", "math", "code", "tool_calling"),
    "nemotron-post-training-dataset-v2": _chat("nvidia/Nemotron-Post-Training-Dataset-v2", "stem", "chat", "math", "code"),
    "nemotron-sft-instruction-following-chat-v2": _chat("nvidia/Nemotron-SFT-Instruction-Following-Chat-v2", "reasoning_off"),
    "nemotron-science-v1": _chat("nvidia/Nemotron-Science-v1", "MCQ", "RQA"),
    "nemotron-competitive-programming-v1": _chat("nvidia/Nemotron-Competitive-Programming-v1",
                                                 *(f"competitive_coding_{language}_part0{part}" for language in ("cpp", "python")
                                                   for part in (0, 1))),
    "nemotron-sft-agentic-v2": _chat("nvidia/Nemotron-SFT-Agentic-v2", "search", data_files="data/{split}*.jsonl"),
    "nemotron-math-v2": _chat("nvidia/Nemotron-Math-v2", "high_part00", "high_part01", "high_part02", "medium", "low"),
    "nemotron-sft-swe-v2": _chat("nvidia/Nemotron-SFT-SWE-v2", "agentless"),
    "nemotron-sft-multilingual-v1": _chat("nvidia/Nemotron-SFT-Multilingual-v1",
                                          *(f"{subject}_{language}" for subject in ("code", "math", "stem") for language in _LANGUAGES)),
}

COMBOS: dict[str, tuple[str, ...]] = {
    "cnn_nemotron_v2_mix": ("cnn_dailymail", "nemotron-post-training-dataset-v2"),
    "nemotron-post-training-v3": ("nemotron-sft-instruction-following-chat-v2", "nemotron-science-v1",
                                  "nemotron-competitive-programming-v1", "nemotron-sft-agentic-v2", "nemotron-math-v2",
                                  "nemotron-sft-swe-v2", "nemotron-sft-multilingual-v1"),
}
