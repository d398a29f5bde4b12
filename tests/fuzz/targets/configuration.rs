//! Any bytes as a configuration file: it loads, or is refused in one line.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use nftproxy::config::{self, Flags};

fuzz_target!(|bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("nftproxy-fuzz-{}.conf", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary folder can be written to");
    let flags = Flags { config: Some(path), given: BTreeMap::new() };
    match config::load(&flags) {
        Ok(loaded) => drop(config::document(&loaded)),
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
});
