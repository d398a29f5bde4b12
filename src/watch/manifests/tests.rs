//! Directories as people and tools leave them: what is in force, and what is said about the rest.

mod following;

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;

use super::*;
use crate::model::{EndpointSlice, NamespacedName, Protocol};

/// A directory of manifests, and what reads it.
struct Case {
    dir: tempfile::TempDir,
    manifests: Manifests,
}

impl Case {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let manifests = Manifests::new(dir.path().to_owned(), "node-1".to_owned());
        let case = Self { dir, manifests };
        for (name, text) in files {
            case.write(name, text);
        }
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let hidden = self.path(".new");
        fs::write(&hidden, text).unwrap();
        fs::rename(hidden, self.path(name)).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).unwrap();
    }

    /// The objects of the first reading, and what was said.
    fn read(&mut self) -> (Vec<Event>, Vec<String>) {
        let (events, problems) = self.manifests.read().unwrap();
        let plain = |event: &Event| !matches!(event, Event::Listing(_) | Event::Listed(_));
        (events.into_iter().filter(plain).collect(), lines(&problems))
    }

    /// What changed since.
    fn rescan(&mut self) -> (Vec<Event>, Vec<String>) {
        let changes = self.manifests.rescan(&Touched::default()).unwrap();
        (changes.events, lines(&changes.problems))
    }
}

fn lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

/// The names in events: `+web` for an object, `-web` for one that is gone.
fn names(events: &[Event]) -> Vec<String> {
    let short = |name: &NamespacedName| name.as_str().rsplit('/').next().unwrap().to_owned();
    let name = |event: &Event| match event {
        Event::Service(service) => format!("+{}", short(&service.name)),
        Event::EndpointSlice(slice) => format!("+{}", short(&slice.name)),
        Event::ServiceCidr(cidr) => format!("+{}", short(&cidr.name)),
        Event::Node(node) => format!("+{}", node.name),
        Event::Gone(_, name) => format!("-{}", short(name)),
        other => format!("{other:?}"),
    };
    events.iter().map(name).collect()
}

/// A Service in YAML: a port is its mark.
fn web(name: &str, port: u32) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name} }}\nspec:\n  clusterIP: \
         10.96.0.10\n  ports: [{{ port: {port} }}]\n"
    )
}

fn json(name: &str, port: u32) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}"}},"spec":{{"clusterIP":"10.96.0.10","ports":[{{"port":{port}}}]}}}}"#
    )
}

fn port_of(event: &Event) -> u16 {
    let Event::Service(service) = event else { panic!("{event:?}") };
    service.ports[0].port
}

fn indented(text: &str) -> String {
    let mut lines = text.lines();
    let first = format!("- {}\n", lines.next().unwrap());
    lines.fold(first, |text, line| text + "  " + line + "\n")
}

#[test]
fn every_way_to_write_two_objects_means_the_same() {
    let (a, b) = (web("a", 80), web("b", 81));
    let list = format!("apiVersion: v1\nkind: List\nitems:\n{}{}", indented(&a), indented(&b));
    let bare = |text: &str| indented(text).replace("- apiVersion: v1\n  kind: Service\n  ", "- ");
    let cases = [
        ("a.yaml", format!("{a}---\n{b}")),
        ("a.yml", format!("---\n# nothing yet\n---\n{a}---\n---\n{b}---\n...\n")),
        ("a.yaml", format!("\u{feff}{a}---\n{b}")),
        ("a.yaml", format!("{a}---\n{b}").replace('\n', "\r\n")),
        ("a.yaml", list),
        ("a.yaml", format!("apiVersion: v1\nkind: ServiceList\nitems:\n{}{}", bare(&a), bare(&b))),
        ("a.yaml", format!("{}\n---\n{}\n", json("a", 80), json("b", 81))),
        ("a.json", json("a", 80) + &json("b", 81)),
        ("a.json", format!("{}\n\n{}\n", json("a", 80), json("b", 81))),
        (
            "a.json",
            format!(
                r#"{{"apiVersion":"v1","kind":"List","items":[{},{}]}}"#,
                json("a", 80),
                json("b", 81)
            ),
        ),
    ];
    let expected = Case::new(&[("a.yaml", &a), ("b.yaml", &b)]).read();
    assert_eq!(names(&expected.0), ["+a", "+b"]);
    assert_eq!(expected.1, [""; 0]);
    for (name, text) in cases {
        assert_eq!(Case::new(&[(name, &text)]).read(), expected, "{name}:\n{text}");
    }
}

#[test]
fn a_listing_names_every_kind_even_without_objects() {
    let mut case = Case::new(&[]);
    let (events, problems) = case.manifests.read().unwrap();
    assert_eq!(problems, []);
    let expected: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(|kind| [Event::Listing(kind), Event::Listed(kind)])
        .collect();
    assert_eq!(events, expected);
}

/// A file that does not count: what is in it, and where the fault is said to be.
#[test]
fn a_file_that_cannot_be_read_keeps_its_last_good_state() {
    let good = web("web", 80);
    let deep = |open: &str, close: &str| open.repeat(20_000) + &close.repeat(20_000);
    let [brackets, braces, dashes] = [deep("[", "]"), deep("{a: ", "}"), deep("- ", "")];
    let cases: &[(&str, &[u8], &str)] = &[
        ("web.yaml", b"apiVersion: v1\nkind: [\n", "web.yaml: "),
        ("web.yaml", b"kind: Service\n\tmetadata: {}\n", "web.yaml: "),
        ("web.yaml", b"<html>not found</html>", "web.yaml, document 1: is not an object"),
        ("web.yaml", b"- just\n- a list\n", "web.yaml, document 1: is not an object"),
        ("web.yaml", b"kind: Service\n", "web.yaml, document 1: has no apiVersion"),
        ("web.yaml", b"apiVersion: v1\nkind: 7\n", "web.yaml, document 1: has no kind"),
        ("web.yaml", b"\xff\xfek\0i\0n\0d\0", "web.yaml: is not UTF-8: "),
        ("web.yaml", b"kind: \x80\x81\n", "web.yaml: is not UTF-8: "),
        ("web.yaml", b"\x1f\x8b\x08\0\0\0\0\0", "web.yaml: is not UTF-8: "),
        ("web.yaml", b"", "web.yaml: is empty; remove it to remove its objects"),
        ("web.yaml", brackets.as_bytes(), "web.yaml: "),
        ("web.yaml", braces.as_bytes(), "web.yaml: "),
        ("web.yaml", dashes.as_bytes(), "web.yaml: "),
        ("web.json", brackets.as_bytes(), "web.json: "),
        ("web.json", b"{\"kind\": \"Service\",}", "web.json: trailing comma at line 1 column 20"),
        ("web.json", b"{\"kind\": \"Serv", "web.json: "),
        ("web.json", b"[]", "web.json, document 1: is not an object"),
    ];
    let objects = [
        ("web.yaml", "port: 80", "port: eighty", "Service default/web: spec.ports[0].port: "),
        ("web.yaml", "port: 80", "port: 99999999999", "Service default/web: spec.ports[0].port: "),
        ("web.yaml", "port: 80", "port: 80.5", "Service default/web: spec.ports[0].port: "),
        ("web.yaml", "ports: [", "ports: 7 #", "Service default/web: spec.ports: "),
        ("web.yaml", "10.96.0.10", "[10.96.0.10]", "Service default/web: spec.clusterIP: "),
        ("web.yaml", "{ name: web }", "web", "Service \"\"/\"\": metadata: "),
    ];
    let objects = objects.map(|(name, from, to, said)| {
        let bad = good.replace(from, to);
        assert_ne!(bad, good);
        // Behind a good one, which does not count either.
        (name, web("other", 81) + "---\n" + &bad, format!("{name}, document 2, {said}"))
    });
    let list = format!("apiVersion: v1\nkind: List\nitems:\n{}- 7\n", indented(&web("other", 81)));
    let all = cases
        .iter()
        .map(|(name, bytes, said)| (*name, bytes.to_vec(), (*said).to_owned()))
        .chain(objects.into_iter().map(|(name, text, said)| (name, text.into_bytes(), said)))
        .chain([(
            "web.yaml",
            list.into_bytes(),
            "web.yaml, document 1, item 2: is not an object".to_owned(),
        )]);
    for (name, bytes, said) in all {
        let was = if name.ends_with("json") { json("web", 80) } else { good.clone() };
        let mut case = Case::new(&[(name, &was), ("next.yaml", &web("next", 1))]);
        assert_eq!(names(&case.read().0), ["+next", "+web"]);

        // It changes for the worse, and another file changes, too.
        case.write(name, &bytes);
        case.write("next.yaml", web("next", 2));
        let (events, problems) = case.rescan();
        assert_eq!(names(&events), ["+next"], "{said}");
        assert_eq!(port_of(&events[0]), 2);
        assert_eq!(problems.len(), 1, "{problems:#?}");
        let problem = &problems[0];
        assert!(problem.starts_with(&said), "expected {said}\nfound    {problem}");
        assert!(problem.ends_with("; the file's last good state stays in force"), "{problem}");
        assert!(problem.len() < 700 && !problem.contains(char::is_control), "{problem}");
        assert_eq!(case.manifests.refused(), 1);
        // Said once.
        assert_eq!(case.rescan(), (vec![], vec![]));

        // It is mended, with a change.
        case.write(name, was.replace("80", "8080"));
        let changes = case.manifests.rescan(&Touched::default()).unwrap();
        assert_eq!((changes.mended, changes.problems), (vec![name.to_owned()], vec![]));
        assert_eq!(changes.events.iter().map(port_of).collect::<Vec<_>>(), [8080]);
        assert_eq!(case.manifests.refused(), 0);

        // Bad from the start, it takes nothing else with it. An empty file is fine there.
        let mut case = Case::new(&[("next.yaml", &web("next", 1))]);
        case.write(name, &bytes);
        let (events, problems) = case.read();
        assert_eq!(names(&events), ["+next"]);
        if bytes.is_empty() {
            assert_eq!(problems, [""; 0]);
        } else {
            assert!(problems[0].ends_with("; nothing of the file is in force"), "{problems:?}");
        }
    }
}

#[test]
fn aliases_that_expand_without_end_are_refused() {
    let laughs = (1..12).fold("a0: &a0 [x, x]\n".to_owned(), |text, i| {
        let last = format!("*a{}", i - 1);
        let ten = vec![last; 10].join(", ");
        text + &format!("a{i}: &a{i} [{ten}]\n")
    });
    let (events, problems) = Case::new(&[("web.yaml", &laughs)]).read();
    assert_eq!((names(&events).len(), problems.len()), (0, 1));
    assert!(problems[0].starts_with("web.yaml: "), "{}", problems[0]);
    // Those that a person would write are fine.
    let shared = web("a", 80).replace("{ name: a }", "{ name: a, labels: &l { app: x } }")
        + "---\n"
        + &web("b", 81)
            .replace("{ name: b }", "{ name: b, labels: &l { app: x }, annotations: *l }");
    let (events, problems) = Case::new(&[("web.yaml", &shared)]).read();
    assert_eq!((names(&events), problems), (vec!["+a".to_owned(), "+b".to_owned()], vec![]));
}

#[test]
fn a_line_is_counted_from_the_start_of_the_file() {
    let text = web("web", 80) + "---\n# of the second document\nkind: ]\n";
    let (_, problems) = Case::new(&[("web.yaml", &text)]).read();
    let line = text.lines().count();
    assert!(problems[0].contains(&format!(" at line {line}, column 7;")), "{problems:?}");
}

#[test]
fn a_fault_in_a_part_costs_that_part() {
    let text = web("web", 70000) + "---\n" + &web("other", 81).replace("10.96.0.10", "10.96.0.11");
    let mut case = Case::new(&[("web.yaml", &text)]);
    let (events, problems) = case.read();
    assert_eq!(names(&events), ["+other", "+web"]);
    assert_eq!(
        problems,
        [
            "web.yaml, document 1, Service default/web: spec.ports[0].port: 70000 is not a port number \
          (1 to 65535); the port is skipped"
        ]
    );
    assert_eq!(case.manifests.refused(), 0);
    // The same fault in a changed file is not said again.
    case.write("web.yaml", text.replace("81", "82"));
    let (events, problems) = case.rescan();
    assert_eq!((names(&events), problems), (vec!["+other".to_owned()], vec![]));
}

#[test]
fn what_the_api_server_would_fill_in_is_named() {
    let text = web("web", 80);
    let no_ip = text.replace("clusterIP: 10.96.0.10", "clusterIP:");
    let (events, problems) = Case::new(&[("web.yaml", &no_ip)]).read();
    assert_eq!(names(&events), [""; 0]);
    assert_eq!(
        problems,
        ["web.yaml, document 1, Service default/web: spec.clusterIP: has no clusterIP; nothing \
          assigns one here, and the Service is not served"]
    );
    let no_node_port = text.replace("spec:", "spec:\n  type: NodePort");
    let (events, problems) = Case::new(&[("web.yaml", &no_node_port)]).read();
    assert_eq!(names(&events), ["+web"]);
    assert_eq!(
        problems,
        ["web.yaml, document 1, Service default/web: spec.ports[0].nodePort: has no nodePort; \
          nothing assigns one here, and the port is served without"]
    );
}

#[test]
fn of_an_object_in_two_places_the_first_counts() {
    // In one file.
    let twice = web("web", 80) + "---\n" + &web("web", 81);
    let (events, problems) = Case::new(&[("web.yaml", &twice)]).read();
    assert_eq!(events.iter().map(port_of).collect::<Vec<_>>(), [80]);
    assert_eq!(problems, ["Service default/web: is twice in one file; the first one counts"]);

    // In two: the first by name, and the other when that goes.
    let mut case = Case::new(&[("b.yaml", &web("web", 82)), ("a.yaml", &web("web", 81))]);
    let (events, problems) = case.read();
    assert_eq!(events.iter().map(port_of).collect::<Vec<_>>(), [81]);
    assert_eq!(
        problems,
        [
            "b.yaml, Service default/web: is in a.yaml, too, and that one counts; this one takes over \
          when that one goes"
        ]
    );
    case.write("b.yaml", web("web", 83));
    assert_eq!(case.rescan(), (vec![], vec![]), "it does not count and was reported");
    case.remove("a.yaml");
    let (events, problems) = case.rescan();
    assert_eq!((events.iter().map(port_of).collect(), problems), (vec![83], vec![]));
    // Moved to another file, it never goes.
    case.remove("b.yaml");
    case.write("c.yaml", web("web", 83));
    assert_eq!(case.rescan(), (vec![], vec![]));
}

#[test]
fn a_file_that_is_removed_takes_its_objects_along() {
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n  \
                 labels: { kubernetes.io/service-name: web }\naddressType: IPv4\nports: [{ name: \
                 \"\", port: 8080 }]\nendpoints: [{ addresses: [10.244.1.5] }]\n";
    let text = web("web", 80) + "---\n" + slice;
    let mut case = Case::new(&[("web.yaml", &text), ("other.yaml", &web("other", 1))]);
    let (events, _) = case.read();
    assert_eq!(names(&events), ["+other", "+web", "+web-1"]);
    let Event::EndpointSlice(EndpointSlice { ports, .. }) = &events[2] else { panic!() };
    assert_eq!((ports[0].port, ports[0].protocol), (8080, Protocol::Tcp));
    // One object out of the file, then the file.
    case.write("web.yaml", slice);
    assert_eq!(names(&case.rescan().0), ["-web"]);
    case.remove("web.yaml");
    assert_eq!(names(&case.rescan().0), ["-web-1"]);
    // A broken file that is removed: its last good state goes.
    case.write("other.yaml", "{");
    assert_eq!(names(&case.rescan().0), [""; 0]);
    case.remove("other.yaml");
    assert_eq!(names(&case.rescan().0), ["-other"]);
    assert_eq!(case.manifests.refused(), 0);
}

#[test]
fn a_file_that_is_only_touched_is_no_event() {
    let mut case = Case::new(&[("web.yaml", &web("web", 80))]);
    case.read();
    case.write("web.yaml", web("web", 80));
    assert_eq!(case.rescan(), (vec![], vec![]));
    case.write("web.yaml", format!("# said differently\n{}", web("web", 80)));
    assert_eq!(case.rescan(), (vec![], vec![]));
}

#[test]
fn objects_for_somebody_else_are_left_out() {
    let text = [
        web("knative", 80).replace("apiVersion: v1", "apiVersion: serving.knative.dev/v1"),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: x }\ndata: { list: [1, 2] }\n".into(),
        "apiVersion: v1\nkind: Node\nmetadata: { name: node-2 }\n".into(),
        "apiVersion: v1\nkind: Node\nmetadata: { name: node-1 }\n".into(),
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: { name: x }\n".into(),
        web("headless", 80).replace("10.96.0.10", "None"),
        web("named", 80).replace("name: named", "name: named, namespace: prod"),
    ]
    .join("---\n");
    let (events, problems) = Case::new(&[("all.yaml", &text)]).read();
    assert_eq!(names(&events), ["+named", "+x", "+node-1"]);
    assert_eq!(problems, [""; 0]);
}

#[test]
fn a_config_map_is_swapped_as_a_whole() {
    let case = Case::new(&[]);
    // As the kubelet lays it out: files are links into a directory that a link points to.
    let generation = |number: u32, files: &[(&str, String)]| {
        let dir = case.path(&format!("..{number}"));
        fs::create_dir(&dir).unwrap();
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
        symlink(format!("..{number}"), case.path("..data_tmp")).unwrap();
        fs::rename(case.path("..data_tmp"), case.path("..data")).unwrap();
    };
    generation(1, &[("a.yaml", web("a", 80)), ("b.yaml", web("b", 80))]);
    for name in ["a.yaml", "b.yaml"] {
        symlink(format!("..data/{name}"), case.path(name)).unwrap();
    }
    generation(2, &[("a.yaml", web("a", 81)), ("b.yaml", web("b", 80))]);
    // A key that is gone leaves a link to nothing for a moment; one that is new comes late.
    let mut manifests = Manifests::new(case.dir.path().to_owned(), "node-1".to_owned());
    let (events, problems) = manifests.read().unwrap();
    let services: Vec<_> = events.iter().filter(|e| matches!(e, Event::Service(_))).collect();
    assert_eq!(services.iter().map(|e| port_of(e)).collect::<Vec<_>>(), [81, 80]);
    assert_eq!(problems, []);
    generation(3, &[("a.yaml", web("a", 82)), ("c.yaml", web("c", 80))]);
    let changes = manifests.rescan(&Touched::default()).unwrap();
    assert_eq!(names(&changes.events), ["+a", "-b"]);
    assert_eq!(changes.problems, []);
    fs::remove_file(case.path("b.yaml")).unwrap();
    symlink("..data/c.yaml", case.path("c.yaml")).unwrap();
    let changes = manifests.rescan(&Touched::default()).unwrap();
    assert_eq!(names(&changes.events), ["+c"]);
}

#[test]
fn what_is_no_file_of_a_sane_size_is_named_and_never_waited_for() {
    let mut case = Case::new(&[("web.yaml", &web("web", 80))]);
    case.read();
    // A pipe nobody writes to, a link to itself, a directory, and a file of mostly nothing.
    nix::unistd::mkfifo(&case.path("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("loop.yaml", case.path("loop.yaml")).unwrap();
    fs::create_dir(case.path("dir.yaml")).unwrap();
    fs::File::create(case.path("huge.yaml")).unwrap().set_len(65 << 20).unwrap();
    fs::File::create(case.path("vast.json")).unwrap().set_len(1 << 40).unwrap();
    let (events, problems) = case.rescan();
    assert_eq!(names(&events), [""; 0]);
    assert_eq!(
        problems,
        [
            "huge.yaml: is larger than 64 MiB; nothing of the file is in force",
            "loop.yaml: cannot be read: Too many levels of symbolic links (os error 40); nothing of \
             the file is in force",
            "pipe.yaml: is not a regular file; nothing of the file is in force",
            "vast.json: is larger than 64 MiB; nothing of the file is in force",
        ]
    );
    // A file that grows out of bounds keeps what it had.
    fs::File::options().write(true).open(case.path("web.yaml")).unwrap().set_len(65 << 20).unwrap();
    let (events, problems) = case.rescan();
    assert_eq!(names(&events), [""; 0]);
    assert!(problems[0].ends_with("last good state stays in force"), "{problems:?}");
}

#[test]
fn a_file_of_thousands_of_objects_is_read() {
    use std::fmt::Write as _;
    let mut text = String::new();
    for i in 0..5_000 {
        let service = web(&format!("service-{i}"), 80);
        let address = format!("10.{}.{}.{}", 96 + i / 65536, i / 256 % 256, i % 256);
        writeln!(text, "{}---", service.replace("10.96.0.10", &address)).unwrap();
    }
    assert!(text.len() > 500_000);
    let (events, problems) = Case::new(&[("all.yaml", &text)]).read();
    assert_eq!((events.len(), problems.len()), (5_000, 0));
}

#[test]
fn file_names_can_be_anything() {
    let mut case = Case::new(&[("web.yaml", &web("web", 80))]);
    let odd = OsStr::from_bytes(b"\xff\xfe.yaml");
    fs::write(case.dir.path().join(odd), web("odd", 80)).unwrap();
    fs::write(case.path("\u{1b}[2J\n.yaml"), "{").unwrap();
    // Not ours: hidden ones, editors' leftovers, other extensions.
    for name in [".hidden.yaml", "web.yaml~", "#web.yaml#", "web.yaml.swp", "README", "x.YAML.bak"]
    {
        fs::write(case.path(name), "{").unwrap();
    }
    let (events, problems) = case.read();
    assert_eq!(names(&events), ["+odd", "+web"]);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("\"\\u{1b}[2J\\n.yaml\": "), "{}", problems[0]);
}

#[test]
fn a_directory_that_is_away_changes_nothing() {
    let mut case = Case::new(&[("web.yaml", &web("web", 80))]);
    case.read();
    let aside = case.dir.path().with_extension("aside");
    fs::rename(case.dir.path(), &aside).unwrap();
    let error = case.manifests.rescan(&Touched::default()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    // Something else of that name.
    fs::write(case.dir.path(), "").unwrap();
    let error = case.manifests.rescan(&Touched::default()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    fs::remove_file(case.dir.path()).unwrap();
    // Back, with a change.
    fs::rename(&aside, case.dir.path()).unwrap();
    case.write("web.yaml", web("web", 81));
    let (events, problems) = case.rescan();
    assert_eq!((events.iter().map(port_of).collect(), problems), (vec![81], vec![]));
    // Another directory in its place is what it says now.
    fs::rename(case.dir.path(), &aside).unwrap();
    fs::create_dir(case.dir.path()).unwrap();
    assert_eq!(names(&case.rescan().0), ["-web"]);
    fs::remove_dir_all(aside).unwrap();
}

#[test]
fn a_directory_that_was_never_there_is_an_error_that_names_it() {
    let mut manifests = Manifests::new("/nonexistent/manifests".into(), "node-1".into());
    let error = manifests.read().unwrap_err().to_string();
    let expected = "cannot read the manifests in /nonexistent/manifests: No such file or directory";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_single_file_counts_alone_whatever_its_name() {
    let mut case = Case::new(&[("web.conf", &web("web", 80)), ("other.yaml", &web("other", 1))]);
    case.manifests = Manifests::new(case.path("web.conf"), "node-1".into());
    let (events, problems) = case.read();
    assert_eq!((names(&events), problems), (vec!["+web".to_owned()], vec![]));
    case.write("other.yaml", web("other", 2));
    assert_eq!(case.rescan(), (vec![], vec![]));
    case.write("web.conf", web("web", 81));
    assert_eq!(case.rescan().0.iter().map(port_of).collect::<Vec<_>>(), [81]);
    case.write("web.conf", "{");
    let (events, problems) = case.rescan();
    assert_eq!(events, []);
    assert!(problems[0].starts_with("web.conf: "), "{problems:?}");
    // Away, it is like a directory that is away.
    case.remove("web.conf");
    let error = case.manifests.rescan(&Touched::default()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    case.write("web.conf", web("web", 82));
    assert_eq!(case.rescan().0.iter().map(port_of).collect::<Vec<_>>(), [82]);
}
