//! A bare network namespace for tests that program tables without sending packets.
//!
//! The test's thread moves into a namespace of its own; nothing has to be removed, as the namespace
//! goes with the thread. Programs started from that thread are in it, too.

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::utsname::uname;
use socket2::{Domain, Protocol, Socket, Type};

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

/// Says that this kernel lacks something, so that this much of a test is left out. Not a failure where
/// namespaces are required: it is asked of the kernel, and tests/kernels runs old ones on purpose.
pub(crate) fn lacks(what: &str) {
    eprintln!("SKIP: kernel {} lacks {what}", uname().unwrap().release().display());
}

/// Whether the kernel has tables that are owned by a socket and outlive it: makes one, in a namespace
/// that goes with it. nft has no word for them, so the batch is written here byte by byte.
pub(crate) fn has_owned_tables() -> bool {
    const BATCH_BEGIN: u16 = 0x10;
    const BATCH_END: u16 = 0x11;
    const NEW_TABLE: u16 = 10 << 8;
    const OWNER_AND_PERSIST: u8 = 2 | 4;
    // A header, the family, and for the batch's ends the subsystem.
    let message = |kind: u16, flags: u16, family: [u8; 4], attributes: &[u8]| {
        let length = u32::try_from(20 + attributes.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind, flags].map(u16::to_ne_bytes).as_flattened());
        bytes.extend([0; 8]);
        bytes.extend(family);
        bytes.extend(attributes);
        bytes
    };
    let attribute = |kind: u16, value: &[u8; 4]| {
        [&8_u16.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
    };
    let table = [attribute(1, b"own\0"), attribute(2, &[0, 0, 0, OWNER_AND_PERSIST])].concat();
    let request = u16::try_from(libc::NLM_F_REQUEST).unwrap();
    let create = request | u16::try_from(libc::NLM_F_CREATE | libc::NLM_F_ACK).unwrap();
    let batch = [
        message(BATCH_BEGIN, request, [0, 0, 0, 10], &[]),
        message(NEW_TABLE, create, [2, 0, 0, 0], &table),
        message(BATCH_END, request, [0, 0, 0, 10], &[]),
    ]
    .concat();
    let mut errno = None;
    in_namespace(|| {
        let protocol = Some(Protocol::from(libc::NETLINK_NETFILTER));
        let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, protocol).unwrap();
        send(socket.as_raw_fd(), &batch, MsgFlags::empty()).unwrap();
        let mut answer = [0; 256];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap();
        assert!(length >= 20, "an answer with an error number");
        errno = Some(i32::from_ne_bytes(answer[16..20].try_into().unwrap()));
    });
    match errno.expect("a namespace") {
        0 => true,
        errno if [-libc::EOPNOTSUPP, -libc::EINVAL].contains(&errno) => false,
        errno => panic!("owned tables: errno {errno}"),
    }
}

/// Runs `nft` with input; panics with its words if it fails.
pub(crate) fn nft(arguments: &[&str], input: &str) -> String {
    let output = run_nft(arguments, input);
    assert!(
        output.status.success(),
        "nft {arguments:?}: {}\n{input}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// What `nft` says if it does not take these commands.
pub(crate) fn refused(commands: &str) -> Option<String> {
    let output = run_nft(&["-f", "-"], commands);
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

fn run_nft(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nft is installed (package nftables)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
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
