#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    arc_topk_worker::member::any_bytes::operations(bytes);
});
