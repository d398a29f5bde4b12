//! The house rules that a compiler does not check: which ring may know what, where `unsafe` may be,
//! that every module says what it is for, and that files stay readable.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut open = vec![root().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no Rust file under {dir}");
    found
}

/// The program's code: without the tests at the end of the file.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap()
}

/// Files of a ring, and what must not appear in their code.
struct Ring {
    files: &'static [&'static str],
    banned: &'static [&'static [&'static str]],
}

/// Libraries that lead out of the program.
const LIBRARIES: [&str; 8] =
    ["kube::", "k8s_openapi", "tokio", "nftnl", "mnl::", "askama", "tracing", "rand::"];

/// What of the standard library does.
const SYSTEM: [&str; 7] =
    ["std::fs", "std::time", "std::process", "std::env", "UdpSocket", "TcpStream", "TcpListener"];

const RINGS: [Ring; 4] = [
    Ring {
        files: &["src/model"],
        banned: &[
            &LIBRARIES,
            &SYSTEM,
            &["crate::nft", "crate::state", "crate::watch", "crate::ledger"],
        ],
    },
    Ring {
        files: &[
            "src/account.rs",
            "src/connections.rs",
            "src/selection.rs",
            "src/slots.rs",
            "src/maglev.rs",
            "src/nlmsg.rs",
            "src/frontend.rs",
            "src/contribution",
            "src/ledger.rs",
            "src/state",
            "src/settings.rs",
            "src/conntrack/serving.rs",
            "src/conntrack/sweep.rs",
            "src/takeover/chains.rs",
            "src/nft/names",
            "src/nft/connection.rs",
            "src/nft/element.rs",
            "src/nft/rule.rs",
            "src/nft/dataplane",
            "src/nft/ruleset.rs",
            "src/nft/transaction.rs",
            "src/nft/diff.rs",
            "src/nft/interpret.rs",
            "src/nft/jhash.rs",
        ],
        banned: &[
            &LIBRARIES,
            &SYSTEM,
            &[
                "libc::",
                "nix::",
                "crate::watch",
                "crate::reconcile",
                "crate::app",
                "crate::host",
                "netlink::",
            ],
        ],
    },
    // Knows times, and not what time it is.
    Ring {
        files: &["src/health.rs"],
        banned: &[&[
            "kube::",
            "k8s_openapi",
            "tokio",
            "hyper",
            "tracing",
            "std::fs",
            "Instant",
            "SystemTime",
            "now()",
            "UdpSocket",
            "TcpStream",
            "TcpListener",
            "crate::nft",
            "crate::status",
            "crate::server",
        ]],
    },
    // Adapters: one foreign vocabulary each, no sockets, files or clocks.
    Ring {
        files: &[
            "src/watch/convert",
            "src/nft/json.rs",
            "src/nft/text.rs",
            "src/nft/netlink/encode.rs",
            "src/nft/netlink/lower.rs",
            "src/nft/netlink/userdata.rs",
            "src/conntrack/message.rs",
        ],
        banned: &[&SYSTEM, &["kube::", "tokio", "crate::reconcile", "crate::app"]],
    },
];

#[test]
fn each_ring_knows_only_what_it_may() {
    let files = rust_files("src");
    for ring in RINGS {
        for prefix in ring.files {
            let mut matched = false;
            for (path, text) in
                files.iter().filter(|(p, _)| p.to_str().unwrap().starts_with(prefix))
            {
                matched = true;
                for (number, line) in code(text).lines().enumerate() {
                    let line = line.split("//").next().unwrap();
                    let mut banned = ring.banned.iter().copied().flatten();
                    let found = banned.find(|word| line.contains(**word));
                    assert!(
                        found.is_none(),
                        "{}:{}: {found:?} has no place in this ring",
                        path.display(),
                        number + 1
                    );
                }
            }
            assert!(matched, "{prefix} is in a ring, but there is no such file");
        }
    }
}

#[test]
fn kubernetes_types_stay_in_watch_and_libnftnl_in_netlink() {
    for (path, text) in rust_files("src") {
        let path = path.to_str().unwrap();
        let code = code(&text);
        if !path.starts_with("src/watch") {
            assert!(!code.contains("k8s_openapi"), "{path}: Kubernetes types end at src/watch/");
            assert!(!code.contains("use kube::"), "{path}: kube ends at src/watch/");
        }
        if !path.starts_with("src/nft/netlink") {
            assert!(!code.contains("nftnl"), "{path}: libnftnl ends at src/nft/netlink/");
            assert!(!code.contains("mnl_sys"), "{path}: libmnl ends at src/nft/netlink/");
        }
    }
}

#[test]
fn unsafe_code_stays_in_netlink_and_one_call_to_the_allocator_and_says_why_it_is_sound() {
    for (path, text) in rust_files("src") {
        let is_unsafe = |line: &&str| {
            let line = line.split("//").next().unwrap();
            ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| line.contains(word))
        };
        let found = text.lines().filter(is_unsafe).count();
        let allowed = match path.to_str().unwrap() {
            "src/host/memory.rs" => 1,
            path if path.starts_with("src/nft/netlink/") => usize::MAX,
            _ => 0,
        };
        assert!(found <= allowed, "{}: unsafe code", path.display());
        let says_why = found == 0 || text.contains("SAFETY:");
        assert!(says_why, "{}: unsafe code without reason", path.display());
    }
}

#[test]
fn every_module_says_what_it_is_for() {
    for dir in ["src", "tests"] {
        for (path, text) in rust_files(dir) {
            assert!(text.starts_with("//!"), "{}: no head paragraph", path.display());
        }
    }
}

#[test]
fn files_stay_readable() {
    for dir in ["src", "tests"] {
        for (path, text) in rust_files(dir) {
            let lines = text.lines().count();
            assert!(lines <= 800, "{}: {lines} lines; split it", path.display());
        }
    }
}

#[test]
fn names_are_the_fields_own() {
    for (path, _) in rust_files("src") {
        let name = path.file_stem().unwrap().to_str().unwrap();
        for word in ["manager", "helper", "util", "processor", "handler", "common", "misc"] {
            assert!(!name.contains(word), "{}: {word} says nothing", path.display());
        }
    }
}

#[test]
fn the_top_level_is_fixed() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "LICENSE",
        "CHANGELOG.md",
        "README.md",
        "src",
        "templates",
        "deploy",
        "tests",
        "snapshots",
        "target",
    ];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = allowed.contains(&name.as_str()) || name.starts_with('.');
        assert!(known, "{name} does not belong at the top level");
    }
}

#[test]
fn files_that_comments_and_pages_name_are_there() {
    let code = ["src", "tests"].into_iter().flat_map(rust_files);
    let pages = crate::docs::pages().into_iter();
    let pages = pages.map(|page| (page.clone(), fs::read_to_string(page).unwrap()));
    let tops = ["src/", "tests/", "deploy/", "templates/", "snapshots/"];
    let mut named = 0;
    for (path, text) in code.chain(pages) {
        let is_code = path.extension().is_some_and(|extension| extension == "rs");
        let lines = text.lines().filter(|line| !is_code || line.trim_start().starts_with("//"));
        for quoted in lines.flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let file = quoted.split(' ').next().unwrap();
            let is_page = quoted.rsplit_once('.').is_some_and(|(_, ending)| ending == "md");
            if !is_page && !tops.iter().any(|top| file.starts_with(top)) {
                continue;
            }
            let places = [root().to_owned(), path.parent().unwrap().to_owned()];
            let there = places.iter().any(|place| place.join(file).exists());
            assert!(there, "{}: there is no {file}", path.display());
            named += 1;
        }
    }
    assert!(named > 50, "{named}");
}
