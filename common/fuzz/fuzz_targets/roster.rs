#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| arc_topk_common::wire::any_bytes::roster(bytes));
