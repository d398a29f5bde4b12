//! Any bytes as an answer of the kernel: reading it comes to an end. Messages of nftables are not among them:
//! libnftnl ends the process where an attribute is not of the type that it knows, so that those are damaged
//! with more care (`src/nft/netlink/dump/hostile.rs`).
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    nftproxy::fuzzing::netlink(bytes);
});
