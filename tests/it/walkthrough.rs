//! Sessions in the pages that users read are held, command by command, and must answer what the pages
//! show. So the walk through is a transcript, and stays one.
//!
//! A block of the language `console` has commands behind `$ `, each followed by its answer (both
//! streams, as a terminal shows them); a line `…` stands for lines that are left out. A command behind
//! `<!-- $ ` is not shown to who reads the rendered page; its answer is not looked at, but it has to
//! succeed. A command that ends in ` &` goes on until the end of the page; its answer is what it has
//! said when it has programmed everything; `kill %1` ends it, and waits. Each page has a node of its own, with what the example
//! takes for granted around it, and a copy of `deploy/example`.
//!
//! Times, sizes of archives, process numbers and versions differ between runs, and are not compared.
//! `INSTA_UPDATE=always` writes answers anew that are not what was shown.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use regex::Regex;

use crate::docs::{is_renewing, pages, root};
use crate::net::{Net, wait_until};

/// What differs between two runs, and what stands for it.
fn volatile() -> Vec<(Regex, &'static str)> {
    let pairs = [
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
        (r"\d{8}T\d{6}Z", "TIME"),
        (r"\b\d\d:\d\d:\d\d(\.\d+)?\b", "TIME"),
        (r"\b\d+(\.\d+)?(ns|µs|ms|s)\b", "SPAN"),
        (r"\b\d+(\.\d+)? (ms|s)\b", "SPAN"),
        (r"process \d+", "process N"),
        (r"\(\d+ bytes\)", "(N bytes)"),
        (r"Linux \d+\.\S+", "Linux VERSION"),
        (r"\d+ of at most \d+ connections", "N of at most N connections"),
        (r"\b\d+\.\d connections/s", "R connections/s"),
        // Which endpoint gets how many is by chance.
        (r"\b[1-9]\d* connections?\b", "N connections"),
        (r"nftproxy \d+\.\d+\.\d+", "nftproxy VERSION"),
        (r"^ +\d+\.\d +\d+ ", " R N "),
        (r" +", " "),
    ];
    pairs.map(|(pattern, word)| (Regex::new(pattern).unwrap(), word)).into()
}

struct Sameness(Vec<(Regex, &'static str)>);

impl Sameness {
    fn plain(&self, line: &str) -> String {
        let mut line = line.trim_end().to_owned();
        for (pattern, word) in &self.0 {
            line = pattern.replace_all(&line, *word).into_owned();
        }
        line
    }

    fn lines(&self, text: &str) -> Vec<String> {
        text.lines().map(|line| self.plain(line)).collect()
    }

    /// Whether the answer is what is shown.
    fn holds(&self, shown: &[&str], answer: &str) -> bool {
        let answer = self.lines(answer);
        let mut rest = &answer[..];
        let mut parts = shown.split(|line| line.trim() == "…").peekable();
        let mut is_first = true;
        while let Some(part) = parts.next() {
            let part: Vec<String> = part.iter().map(|line| self.plain(line)).collect();
            let found = if parts.peek().is_none() && !is_first {
                // The last one ends the answer.
                rest.len().checked_sub(part.len()).filter(|&at| rest[at..] == part[..])
            } else if is_first {
                rest.starts_with(&part).then_some(0)
            } else {
                (0..=rest.len().saturating_sub(part.len()))
                    .find(|&at| rest[at..].starts_with(&part))
            };
            let Some(at) = found else { return false };
            rest = &rest[at + part.len()..];
            is_first = false;
        }
        rest.is_empty()
    }
}

/// A node, and what was started on it.
struct Node {
    net: Net,
    going_on: Vec<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in &mut self.going_on {
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            let _ = kill(pid, Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

impl Node {
    fn new() -> Option<Self> {
        let net = Net::new()?;
        let example = net.dir.path().join("deploy/example");
        fs::create_dir_all(&example).unwrap();
        for entry in fs::read_dir(root().join("deploy/example")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), example.join(entry.file_name())).unwrap();
        }
        Some(Self { net, going_on: Vec::new() })
    }

    fn shell(&self, command: &str) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_nftproxy"));
        let path = format!(
            "{}:{}:/usr/sbin:/sbin",
            program.parent().unwrap().display(),
            std::env::var("PATH").unwrap()
        );
        let mut shell = Command::new("ip");
        shell.args(["netns", "exec", &self.net.name("node"), "bash", "-c", command]);
        shell.current_dir(self.net.dir.path()).env("PATH", path).env("REPOSITORY", root());
        shell.env_remove("RUST_LOG").env_remove("COLUMNS").stdin(Stdio::null());
        shell
    }

    /// What a terminal shows of the command, and whether it succeeded.
    fn answer(&mut self, command: &str) -> (String, bool) {
        let path = self.net.dir.path().join(format!(".answer-{}", self.going_on.len()));
        let file = File::create(&path).unwrap();
        let said = || fs::read_to_string(&path).unwrap();
        if let Some(command) = command.strip_suffix(" &") {
            let mut shell = self.shell(&format!("exec {command}"));
            shell.stdout(file.try_clone().unwrap()).stderr(file);
            self.going_on.push(shell.spawn().unwrap());
            wait_until("everything to be programmed", || said().contains(" synced "));
            return (said(), true);
        }
        if command == "kill %1" {
            let mut first = self.going_on.remove(0);
            kill(Pid::from_raw(i32::try_from(first.id()).unwrap()), Signal::SIGTERM).unwrap();
            return (String::new(), first.wait().unwrap().success());
        }
        let mut shell = self.shell(command);
        let status = shell.stdout(file.try_clone().unwrap()).stderr(file).status().unwrap();
        (said(), status.success())
    }
}

/// The page with the answers that were given, and what was not as shown.
fn held(text: &str, node: &mut Node, sameness: &Sameness) -> (String, Vec<String>) {
    let (mut page, mut wrong) = (String::new(), Vec::new());
    let mut lines = text.lines().peekable();
    let mut is_session = false;
    while let Some(line) = lines.next() {
        page += &format!("{line}\n");
        if let Some(command) = line.strip_prefix("<!-- $ ") {
            let command = command.trim_end_matches("-->").trim_end();
            let (answer, good) = node.answer(command);
            if !good {
                wrong.push(format!("{command} failed:\n{answer}"));
            }
        }
        if line.starts_with("```") {
            is_session = line == "```console";
        }
        let Some(mut command) = line.strip_prefix("$ ").filter(|_| is_session).map(str::to_owned)
        else {
            continue;
        };
        // As a shell reads it.
        while command.ends_with('\\') {
            let next = lines.next().unwrap();
            page += &format!("{next}\n");
            command.push('\n');
            command += next;
        }
        let mut shown = Vec::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with("$ ") && *line != "```") {
            shown.push(line);
        }
        // A blank line in front of the next command is for the eye.
        let blanks = shown.iter().rev().take_while(|line| line.is_empty()).count();
        let blanks = shown.split_off(shown.len() - blanks);
        let (answer, _) = node.answer(&command);
        if sameness.holds(&shown, answer.trim_end()) {
            page.extend(shown.iter().map(|line| format!("{line}\n")));
        } else {
            wrong.push(format!("$ {command}\n{}", answer.trim_end()));
            page.extend(answer.trim_end().lines().map(|line| format!("{}\n", line.trim_end())));
        }
        page.extend(blanks.iter().map(|_| "\n"));
    }
    (page, wrong)
}

#[test]
fn sessions_in_the_pages_answer_what_they_show() {
    let sameness = Sameness(volatile());
    let (mut commands, mut wrong) = (0, Vec::new());
    for path in pages() {
        let text = fs::read_to_string(&path).unwrap();
        if !text.contains("```console\n") {
            continue;
        }
        let Some(mut node) = Node::new() else { return };
        let (page, found) = held(&text, &mut node, &sameness);
        commands += text.lines().filter(|line| line.starts_with("$ ")).count();
        if page != text && is_renewing() {
            fs::write(&path, page).unwrap();
        } else {
            let name = path.strip_prefix(root()).unwrap().display();
            wrong.extend(found.iter().map(|wrong| format!("{name}: {wrong}")));
        }
    }
    assert!(wrong.is_empty(), "INSTA_UPDATE=always renews them:\n{}", wrong.join("\n\n"));
    assert!(commands > 20, "only {commands} commands");
}

#[test]
fn an_answer_is_compared_but_for_what_differs_by_itself() {
    let sameness = Sameness(volatile());
    let answer = "took=1.2ms at 16:18:11.831\n  a  b\nc\nd";
    for (shown, holds) in [
        (&["took=870µs at 09:00:00.1", " a b", "c", "d"][..], true),
        (&["took=870µs at 09:00:00.1", "…"], true),
        (&["took=870µs at 09:00:00.1", "…", "d"], true),
        (&["…", "c", "…"], true),
        (&["…", "d", "…", "c", "…"], false),
        (&["…", "c"], false),
        (&["took=870µs at 09:00:00.1"], false),
        (&[], false),
    ] {
        assert_eq!(sameness.holds(shown, answer), holds, "{shown:?}");
    }
    assert!(sameness.holds(&[], ""));
}
