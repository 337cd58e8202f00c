"""What MLC's engine calls of a KV cache, as its C++ sources of July 2026 name it.

``tests/mlc/test_engine_names.py`` compares the list with the sources, where they are.
"""

#: Functions ``vm.builtin.*`` that take a cache.
CACHE_CALLS = {
    "attention_kv_cache_commit_accepted_token_tree_nodes",
    "attention_kv_cache_enable_sliding_window_for_seq",
    "attention_kv_cache_get_num_available_pages",
    "attention_kv_cache_get_total_sequence_length",
    "kv_cache_disagg_mark_send",
    "kv_cache_disagg_prepare_recv",
    "kv_state_add_sequence",
    "kv_state_begin_forward",
    "kv_state_clear",
    "kv_state_end_forward",
    "kv_state_fork_sequence",
    "kv_state_popn",
    "kv_state_remove_sequence",
}
#: Functions of a compiled model that make a cache: the engine takes one or the other.
CREATIONS = {"create_tir_paged_kv_cache", "create_flashinfer_paged_kv_cache"}
