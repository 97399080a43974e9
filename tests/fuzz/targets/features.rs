#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::fuzzing::fuzz_features(data));
