#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| arc_topk_ps::shard::any_bytes::operations(bytes));
