"""Typed access to config.json, which notes what was asked for: whatever nobody asks for is refused or harmless, never overlooked."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REQUIRED = object()

# Keys that cannot change what a forward computes: tokens, training, generation, how a model was made and loaded. max_position_embeddings
# is asked for where it matters.
HARMLESS = frozenset("""
_attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _model_name_or_path _name_or_path add_bos_token
add_cross_attention add_eos_token architectures attention_dropout attn_implementation attn_pdrop auto_map aux_loss_alpha bad_words_ids
begin_suppress_tokens bos_token_id cache_implementation chat_template chunk_size_feed_forward compression_config
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size
eos_token_id ep_size experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
for_llm_compressor gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_factor initializer_range is_decoder
is_encoder_decoder label2id length_penalty max_length max_position_embeddings max_sequence_length min_length model_max_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_labels num_nextn_predict_layers num_return_sequences output_attentions output_dropout
output_hidden_states output_past output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
quantization_config remove_invalid_values repetition_penalty resid_pdrop residual_dropout return_dict return_dict_in_generate rope_scaling
rope_parameters router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id seq_aux std_token_id suppress_tokens
task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class tokenizer_model_max_length top_k top_p torch_dtype
torchscript transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn
use_flash_attention vision_config image_token_id image_token_index boi_token_id boi_token_index eoi_token_id eoi_token_index
mm_tokens_per_image
""".split())

# Keys of other families that a config class in transformers takes, keeps and never reads.
_OF_OTHERS = frozenset("attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types".split())


class Config:
    """A key that is absent has the default of the model type, then the caller's; null counts as absent to the caller."""

    def __init__(self, values: Mapping[str, Any], absent: Mapping[str, Any], prefix: str = ""):
        self.values, self.absent, self.prefix = values, absent, prefix
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.values[key] if key in self.values else self.absent.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        value = self._required(key, default)
        if value is not default and (type(value) is not int or value < least):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected an integer > {least - 1}")
        return value

    def real(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected a number > 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected true or false")
        return value

    def word(self, key: str, default: str, known: tuple[str, ...]) -> str:
        value = self.get(key, default)
        if value not in known:
            raise ValueError(f"config.json: {self.prefix}{key} {value!r} is not supported; supported are {', '.join(known)}")
        return str(value)

    def only(self, key: str, *values: Any) -> None:
        """Refuse whatever is computed otherwise than with these values; absent counts as the first."""
        value = self.get(key, values[0])
        if value not in values:
            raise ValueError(f"config.json: {self.prefix}{key} {value!r} is not supported; supported is {' or '.join(map(repr, values))}")

    def numbers(self, key: str) -> list[float]:
        value = self._required(key, _REQUIRED)
        if not isinstance(value, list) or not value or not all(type(item) in (int, float) and item > 0 for item in value):
            raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, expected a list of numbers > 0")
        return [float(item) for item in value]

    def refuse_unknown(self, family: str) -> None:
        """ValueError for a key that nobody asked for, unless it is one that changes nothing, or says that something is not there."""
        for key, value in self.values.items():
            off = value is None or value is False or value == [] or value == {}
            if key not in self.asked and key not in HARMLESS and key not in _OF_OTHERS and not off:
                raise ValueError(f"config.json: {self.prefix}{key} is {value!r}, which is not known in a model of the family {family}: it "
                                 "may change what the model computes. If it does not, take it out of config.json")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise ValueError(f"config.json: {self.prefix}{key} is missing")
        return value
