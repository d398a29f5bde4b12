//! A bare network namespace for tests that program tables without sending packets.
//!
//! The test's thread moves into a namespace of its own; nothing has to be removed, as the namespace
//! goes with the thread. Programs started from that thread are in it, too.

use std::io::Write as _;
use std::process::{Child, ChildStdin, Command, Stdio};

use nix::sched::{CloneFlags, unshare};

/// Runs `body` in a new namespace. Without root: says so and does nothing, or fails if
/// `REQUIRE_NETNS` is set.
pub(crate) fn in_namespace(body: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
            Ok(()) => body(),
            Err(errno) => skip(&format!("cannot make a network namespace: {errno}")),
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Leaves a test out, loudly; where namespaces are required that is a failure.
pub(crate) fn skip(reason: &str) {
    assert!(std::env::var_os("REQUIRE_NETNS").is_none(), "REQUIRE_NETNS is set, but {reason}");
    eprintln!("SKIP: {reason}");
}

/// Runs `nft` with input; panics with its words if it fails.
pub(crate) fn nft(arguments: &[&str], input: &str) -> String {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nft is installed (package nftables)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "nft {arguments:?}: {}\n{input}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a table `ip nftproxy` that another program owns: an `nft`, given as it is to be started. It
/// owns the table until its input is closed.
pub(crate) fn own_table(mut nft: Command) -> (Child, ChildStdin) {
    let mut owner =
        nft.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("nft starts");
    let mut stdin = owner.stdin.take().unwrap();
    writeln!(stdin, "add table ip nftproxy {{ flags owner; }}").unwrap();
    (owner, stdin)
}
