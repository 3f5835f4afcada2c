"""Settings of all tests, and of the processes that they start."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

import pytest

# Compiling is most of what small models cost; the tests need right programs, not fast ones. With these, a training
# step of a small BERT compiled in 0.8 s instead of 3.4 s.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"  # later versions refuse to start with it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test processes compile for TPUs side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests that repeat a check of the default suite on another model, setting or moment, by file and the beginning of the
# name. `make test-slow` runs them.
SLOW = {
    "explain": ["test_a_detector", "test_an_encoder_decoder"],
    "analysis/explanation": [
        *("test_encoder_decoders", "test_detectors", "test_vision_transformers[token"),
        *("test_classifiers_of_texts[modernbert", "test_classifiers_of_texts[roberta"),
    ],
    "harness": ["test_beams_and_samples"],
    "tasks/prompt_tuning": [
        f"test_vectors_that_are_embeddings_are_read_as_their_tokens[{kind}" for kind in ("seq2seq", "classification")
    ],
    "unsaved": [
        *(f"test_whatever_is_frozen_comes_back[{name}" for name in ("ia3", "prompt", "dora", "bias")),
        "test_checkpoints_that_hold_everything",
    ],
    "collectives": [
        "test_data_parallel_devices_exchange_gradients_alone[bert",
        "test_data_parallel_devices_exchange_gradients_alone[detr",
        "test_data_parallel_devices_exchange_gradients_alone[the others",
        "test_fully_sharded_devices_gather_parameters_alone[llama",
    ],
    "configs": [
        *("test_tiny_learns[finetune_detection", "test_tiny_learns[detr_coco", "test_tiny_learns[dinov2_garments"),
        *("test_tiny_learns[vit_imagenet", "test_tiny_learns[vit_cifar", "test_tiny_learns[finetune_images"),
        *("test_tiny_learns[finetune_seq2seq", "test_tiny_learns[glue", "test_tiny_learns[mae_fashion_mnist.py-probe"),
        *("test_tiny_learns[mae_fashion_mnist.py-finetune", "test_tiny_learns[libreoffice_translation.py-t5"),
        *("test_tiny_learns[squad", "test_tiny_learns[llama", "test_tiny_learns[gpt", "test_tiny_learns[pretrain_text"),
        *("test_tiny_learns[jane_austen", "test_tiny_learns[small_bert", "test_tiny_learns[finetune_text"),
        *("test_tiny_learns[grokking", "test_tiny_learns[libreoffice_translation.py-tiny"),
        *("test_tiny_learns[conll2003", "test_tiny_learns[dit_fashion_mnist", "test_tiny_learns[bert_pretraining"),
        *("test_tiny_learns[detr_garments", "test_tiny_learns[t5", "test_tiny_learns[vit_fashion_mnist"),
        *("test_tiny_learns[calibration", "test_tiny_learns[clip_fashion_mnist", "test_tiny_learns[induction_heads"),
        *("test_tiny_learns[isoflop", "test_tiny_learns[mup", "test_tiny_learns[quantization"),
        *(f"test_tiny_learns[movie_snippets.py-{name}" for name in ("dora", "ia3", "prompt", "bias")),
        *(f"test_builds_and_its_step_has_shapes[isoflop.py-{compute}" for compute in ("1e11", "1e12")),
        *(f"test_builds_and_its_step_has_shapes[quantization_smollm2.py-{name}" for name in ("int", "fp4", "float32")),
        "test_builds_and_its_step_has_shapes[bert_pretraining.py-jane_austen",
        *(f"test_builds_and_its_step_has_shapes[snippet_preferences.py-{name}" for name in ("before", "orpo", "tiny")),
        # Sizes of a recipe, of which the default suite builds the smallest or the default, and the largest.
        *(
            f"test_builds_and_its_step_has_shapes[dit_imagenet.py-{size}"
            for size in ("s4", "s8", "b", "l", "xl4", "xl8")
        ),
        *(f"test_builds_and_its_step_has_shapes[clip.py-{size}" for size in ("base16", "large14")),
        *(f"test_builds_and_its_step_has_shapes[gpt2.py-{size}" for size in ("medium", "large")),
        *(f"test_builds_and_its_step_has_shapes[gpt3.py-{size}" for size in ("3", "7", "1.3", "2.7", "6.7", "13")),
        *(f"test_builds_and_its_step_has_shapes[llama.py-{size}" for size in ("smollm2_3", "smollm2_1.7", "llama2")),
        *(f"test_builds_and_its_step_has_shapes[t5.py-{size}" for size in ("base", "large", "3b", "v1_1_base")),
        *(f"test_builds_and_its_step_has_shapes[t5.py-{size}" for size in ("v1_1_large", "v1_1_xl]", "v1_1_small")),
        *(f"test_builds_and_its_step_has_shapes[mae_imagenet.py-{size}" for size in ("large", "huge-f", "huge-probe")),
    ],
    "resume": [
        "test_a_run_killed_again_and_again_ends_with_the_same_bits[evaluating",
        *("test_going_on_with_other_devices_computes_the_same", "test_a_damaged_checkpoint_falls_back"),
        *("test_a_full_disk_stops_the_run", "test_no_readable_checkpoint_is_an_error"),
        "test_another_learning_rate_is_the_users_mistake",
        "test_sigterm_while_compiling_and_training",  # two processes are stopped by it in the default suite
        "test_an_evaluation_interrupted_by_sigterm",  # train_test has it within one process
        "test_a_loss_that_is_not_finite_is_one_line",  # train_test has it within one process
    ],
    "language_modes": [
        *("test_questions[v2", "test_texts_that_are_written[chat", "test_an_answer_ends_where_its_turn_does"),
        "test_causal_language_models_say_how_likely",
    ],
    "mup": ["test_updates_are_as_large"],
    "optimizer": ["test_layer_decay_reaches_what_an_image"],
    "tasks/reconstruction": [
        *("test_the_loss_falls_on_drawn_shapes", "test_a_pretrained_encoder_is_what"),
    ],
    "tasks/diffusion": ["test_it_learns_drawn_shapes[v", "test_it_learns_drawn_shapes[flow"],
    "tasks/image_classification": ["test_a_teacher_of_another_run", "test_the_distillation_token_learns"],
    "tasks/lm_distillation": [
        "test_a_student_that_is_its_teacher",
        "test_the_divergence_is_its_formula[reverse-2",
        *(f"test_the_divergence_is_its_formula[{name}-1.0-1.0" for name in ("forward", "reverse")),
    ],
    "precompute": ["test_training_is_that_with_a_reference_that_is_held[ipo"],
    "tasks/preferences": [
        *(f"test_it_learns_and_the_reference_stays_bit_identical[{name}" for name in ("ipo", "kto", "simpo", "orpo")),
        *(
            f"test_padding_chunks_and_what_is_masked_change_neither_loss_nor_gradient[{name}"
            for name in ("dpo", "ipo", "simpo", "orpo")
        ),
    ],
    "tasks/tokens": [
        "test_chunks_change_neither_the_loss_nor_the_gradient[1",
        "test_the_loss_and_its_gradient_are_those_of_all_logits[0",
        "test_the_loss_and_its_gradient_are_those_of_all_logits[4-False",
        "test_chunks_change_neither_the_loss_nor_the_gradient[3",
    ],
    "tasks/detection": ["test_the_loss_is_its_formula[False", "test_the_order_of_the_targets"],
    "step": [
        "test_accumulated_gradients_are_those_of_the_whole_batch[None",
        "test_accumulated_gradients_are_those_of_the_whole_batch[mask1-2",
        "test_accumulated_gradients_are_those_of_the_whole_batch[mask2",
    ],
    "generation/decoding": [
        *("test_an_output_ends_with_the_positions[1", "test_a_stream_gives_the_same_tokens[t5"),
        *(
            "test_a_cache_changes_nothing_and_a_batch_equals_its_rows[marian",
            "test_beams_of_a_batch_equal_those_of_its_rows[t5",
        ),
        *("test_a_cache_changes_nothing_and_a_batch_equals_its_rows[gpt2", "test_beam_search_finds_the_best_of_all[2"),
    ],
    "generation/diffusion": ["test_a_normal_distribution_is_drawn[linear", "test_learned_variances_are_used"],
    "generation/draw": ["test_published_weights_need_no_run"],
    "models/backward": [
        *("test_attention_can_be_computed_again_alone[grouped", "test_attention_can_be_computed_again_alone[encoder]"),
        "test_attention_can_be_computed_again_alone[image encoder",
    ],
    "models/attention": ["test_every_implementation_equals_the_reference[4"],
    "models/encoder_decoder": [
        *("test_initial_values_keep_the_variance_at_one[t5", "test_packed_pairs_equal_pairs_by_themselves[t5"),
        *("test_the_cache_equals_recomputation[t5", "test_each_dropout_rate_is_used", "test_unroll_and_remat"),
    ],
    "models/bert": [
        *("test_padding_changes_nothing[roberta", "test_padding_changes_nothing[distilbert", "test_unroll_and_remat"),
        "test_the_head_dropout_of_tokens",
    ],
    "models/detr": ["test_unrolling_and_recomputing_change_nothing"],
    "models/dit": ["test_unrolled_rematerialised"],
    "models/gpt": ["test_gradients_are_finite_and_reach_every_parameter[windowed"],
    "models/vit": ["test_the_layout_of_the_scan"],
    "train": [
        "test_patience_ends_a_run_and_the_best_checkpoint_stays[min-losses0",
        *(
            "test_patience_ends_a_run_and_the_best_checkpoint_stays[max",
            "test_patience_ends_a_run_and_the_best_checkpoint_stays[min-losses3",
        ),
    ],
    "modes": [
        "test_evaluate_repeats_the_result[multi_label",
        "test_predict[regression",
        "test_predict_from_standard",
        "test_evaluate_repeats_the_result[regression",
        "test_export_loads_back[regression",
    ],
    "predict_images": ["test_one_image_and_json_lines"],
    "sharding": [
        "test_four_devices_compute_what_one_does[finetune_preferences",
        "test_four_devices_compute_what_one_does[detr",
        "test_four_devices_compute_what_one_does[dit",
        "test_four_devices_compute_what_one_does[mae",
    ],
}


# Every compiled program maps memory, and a process has 65,530 maps (vm.max_map_count). Beyond them LLVM fails, and
# serialising its half-made program for the cache on disk is a segmentation fault. One process with the whole suite
# reaches that; real runs hold a few programs.
MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _programs_are_released():
    """Release the compiled programs of earlier files before their memory maps run out."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        sys.modules["jax"].clear_caches()


def pytest_configure(config):
    """Says what the comparisons need, instead of an error at every import."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if config.option.markexpr == "peers" and missing:
        pytest.exit(f"'{missing[0]}' is missing: run `make install EXTRAS=test,peers` for the comparisons with it", 2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what is listed in `SLOW`, before pytest deselects by marker."""
    for item in items:
        file = item.path.relative_to(item.config.rootpath / "tests").as_posix().removesuffix("_test.py")
        if any(item.name.startswith(name) for name in SLOW.get(file, ())):
            item.add_marker(pytest.mark.slow)
