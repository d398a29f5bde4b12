//! The manifests under `deploy/example`, which the README and `tests/demo` show: they render without
//! a word of complaint, and nft takes the result.

use std::path::Path;
use std::process::Command;

use crate::namespace::{in_namespace, nft};
use crate::render::snapshots;

#[test]
fn the_example_renders_without_a_warning() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/example");
    let output = Command::new(env!("CARGO_BIN_EXE_nftproxy"))
        .args(["render", "--hostname-override", "demo-node"])
        .args(["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48", "--manifests"])
        .arg(example)
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    snapshots().bind(|| insta::assert_snapshot!("example", text));
    in_namespace(|| drop(nft(&["-c", "-f", "-"], &text)));
}
