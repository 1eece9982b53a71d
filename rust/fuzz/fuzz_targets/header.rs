//! Any text as a header, up to the first zero byte, and the bytes behind it as tensors; lengths and checksums are right.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    vqrs_fuzz::open(&vqrs_fuzz::sealed(&bytes[..end], bytes.get(end + 1..).unwrap_or_default()));
});
