//! The watch of one kind against a server that is told what to answer. Time stands still but for
//! waits: pauses of minutes take none, and are what they are.

mod place;
mod server;

use serde_json::{Value, json};
use tokio::sync::mpsc::Receiver;
use tokio::time::Instant;

use self::server::{Log, Server, server, status};
use super::*;
use crate::model::NodeFacts;
use crate::settings::Settings;
use crate::state::State;

/// One watch, and both its ends.
struct Bench {
    server: Server,
    events: Receiver<Event>,
    shared: Arc<Shared>,
    log: Log,
    _logging: tracing::subscriber::DefaultGuard,
}

impl Bench {
    fn start<K: Watched>() -> Self {
        let (log, logging) = Log::start();
        let shared = Arc::new(Shared::default());
        let (server, events) = watch::<K>(&shared);
        Self { server, events, shared, log, _logging: logging }
    }

    async fn event(&mut self) -> Event {
        tokio::time::timeout(Duration::from_secs(1800), self.events.recv()).await.unwrap().unwrap()
    }

    /// The next events in a few words each.
    async fn saw(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(words(&self.event().await), *expected, "log:\n{}", self.log.text());
        }
    }

    fn saw_nothing(&mut self) {
        assert_eq!(self.events.try_recv().ok().map(|event| words(&event)), None);
    }
}

fn watch<K: Watched>(shared: &Arc<Shared>) -> (Server, Receiver<Event>) {
    let (client, server) = server();
    let (sender, events) = mpsc::channel(64);
    tokio::spawn(Watch::<K>::new(&client, &"node-1".into(), shared, &sender).run());
    (server, events)
}

fn words(event: &Event) -> String {
    match event {
        Event::Listing(kind) => format!("listing {kind}"),
        Event::Listed(kind) => format!("listed {kind}"),
        Event::Service(service) => format!("{}", service.name),
        Event::EndpointSlice(slice) => format!("{}", slice.name),
        Event::ServiceCidr(cidr) => format!("{}", cidr.name),
        Event::Node(node) => node.name.clone(),
        Event::Gone(_, name) => format!("gone {name}"),
        other => format!("{other:?}"),
    }
}

fn service(name: &str, version: u32) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "x", "resourceVersion": version.to_string() },
        "spec": { "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
                  "ports": [{ "port": 80, "protocol": "TCP" }] },
    })
}

/// One whose first port is no number.
fn nonsense(name: &str, version: u32) -> Value {
    let mut object = service(name, version);
    object["spec"]["ports"][0]["port"] = json!("eighty");
    object
}

#[tokio::test(start_paused = true)]
async fn a_list_is_streamed_and_changes_follow_on_the_same_stream() {
    let mut bench = Bench::start::<Service>();
    let asked = bench.server.asked_for_stream().await;
    assert!(asked.uri.starts_with("/api/v1/services?"), "{}", asked.uri);
    assert!(asked.says("allowWatchBookmarks=true"), "{}", asked.uri);
    assert!(asked.says("resourceVersionMatch=NotOlderThan"), "{}", asked.uri);
    let selector = "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name";
    assert!(asked.says(selector), "{}", asked.uri);
    assert!(asked.says("fieldSelector=spec.clusterIP%21%3DNone"), "{}", asked.uri);
    let mut stream = asked.begin();
    stream.event("ADDED", &service("a", 1));
    stream.event("ADDED", &service("b", 2));
    bench.saw(&["listing Service", "x/a", "x/b"]).await;
    stream.complete(7);
    bench.saw(&["listed Service"]).await;
    stream.event("MODIFIED", &service("a", 8));
    stream.event("ADDED", &service("c", 9));
    stream.event("DELETED", &service("b", 10));
    bench.saw(&["x/a", "x/c", "gone x/b"]).await;
    assert_eq!(bench.log.text(), "");
}

#[tokio::test(start_paused = true)]
async fn each_kind_is_asked_for_as_narrowly_as_the_server_can_tell() {
    let (log, _logging) = Log::start();
    let shared = Arc::new(Shared::default());
    let (mut slices, _slice_events) = watch::<EndpointSlice>(&shared);
    let asked = slices.asked_for_stream().await;
    assert!(asked.uri.starts_with("/apis/discovery.k8s.io/v1/endpointslices?"), "{}", asked.uri);
    assert!(asked.says("labelSelector=%21service.kubernetes.io%2Fheadless"), "{}", asked.uri);
    let (mut node, _node_events) = watch::<Node>(&shared);
    let asked = node.asked_for_stream().await;
    assert!(asked.says("fieldSelector=metadata.name%3Dnode-1"), "{}", asked.uri);
    let (mut cidrs, _cidr_events) = watch::<ServiceCIDR>(&shared);
    let asked = cidrs.asked_for_stream().await;
    assert!(asked.uri.starts_with("/apis/networking.k8s.io/v1/servicecidrs?"), "{}", asked.uri);
    assert_eq!(log.text(), "");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_to_stream_is_asked_for_a_cached_list() {
    let mut bench = Bench::start::<Service>();
    let message =
        "sendInitialEvents is forbidden for watch unless the WatchList feature gate is on";
    let began = Instant::now();
    bench.server.asked_for_stream().await.refuse(422, message);
    let asked = bench.server.asked_for_list().await;
    assert_eq!(began.elapsed(), Duration::ZERO, "it is no failure");
    assert!(asked.says("resourceVersion=0") && !asked.says("limit"), "{}", asked.uri);
    asked.list(7, &[service("a", 1), service("b", 2)]);
    bench.saw(&["listing Service", "x/a", "x/b", "listed Service"]).await;
    let mut stream = bench.server.asked_for_changes(7).await.begin();
    stream.event("MODIFIED", &service("a", 8));
    bench.saw(&["x/a"]).await;
    // Other kinds know it then; and it was said once.
    let (mut other, _events) = watch::<Node>(&bench.shared);
    other.asked_for_list().await;
    assert_eq!(bench.log.count("does not stream lists"), 1, "{}", bench.log.text());
    assert_eq!(bench.log.count(message), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_takes_the_stream_for_a_watch_is_found_out() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("a", 1));
    bench.saw(&["listing Service", "x/a"]).await;
    let began = Instant::now();
    let asked = bench.server.asked_for_list().await;
    assert_eq!(began.elapsed(), STREAMING_PATIENCE);
    bench.saw_nothing();
    asked.list(7, &[service("a", 1), service("b", 2)]);
    bench.saw(&["listing Service", "x/a", "x/b", "listed Service"]).await;
    assert_eq!(bench.log.count("does not stream lists"), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_is_never_taken_for_a_whole_one() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("a", 1));
    bench.saw(&["listing Service", "x/a"]).await;
    stream.break_off();
    let mut stream = bench.server.asked_for_stream().await.begin();
    assert_eq!(bench.log.count("an answer broke off"), 1, "{}", bench.log.text());
    stream.event("ADDED", &service("a", 1));
    bench.saw(&["listing Service", "x/a"]).await;
    // It may as well just end.
    drop(stream);
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("b", 1));
    bench.saw(&["listing Service", "x/b"]).await;
    assert_eq!(bench.log.count("ended a list before it was complete"), 1, "{}", bench.log.text());
    assert_eq!(bench.log.count("again"), 0, "{}", bench.log.text());
    // Or go on behind a fault, which may stand for an object.
    stream.event("ERROR", &status(500, "encoding failed"));
    stream.complete(6);
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("b", 1));
    bench.saw(&["listing Service", "x/b"]).await;
    stream.complete(7);
    bench.saw(&["listed Service"]).await;
    assert_eq!(bench.log.count("serves the kind again"), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_place_the_server_no_longer_knows_is_answered_by_a_new_list() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    // Inside the stream.
    stream.event("ERROR", &status(410, "too old resource version: 7 (9)"));
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("a", 10));
    stream.complete(11);
    bench.saw(&["listing Service", "x/a", "listed Service"]).await;
    // As the answer.
    drop(stream);
    bench.server.asked_for_changes(11).await.refuse(410, "too old resource version: 11 (12)");
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(13);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert_eq!(bench.log.text(), "", "it is nothing to worry about");
}

#[tokio::test(start_paused = true)]
async fn a_place_that_is_never_accepted_is_given_up() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(9000);
    bench.saw(&["listing Service", "listed Service"]).await;
    drop(stream);
    for _ in 0..RESUMPTIONS {
        let asked = bench.server.asked_for_changes(9000).await;
        asked.refuse(504, "Too large resource version: 9000, current: 7");
    }
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(8);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert!(bench.log.count("Too large resource version") >= 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn an_object_that_makes_no_sense_keeps_its_last_state_and_stops_no_other() {
    let mut bench = Bench::start::<Service>();
    let mut state = State::new(Settings::default(), NodeFacts::default());
    let mut names = async |bench: &mut Bench, count: usize| {
        for _ in 0..count {
            state.observe(bench.event().await);
        }
        state.count(Kind::Service)
    };
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("a", 1));
    stream.event("ADDED", &nonsense("b", 2));
    stream.event("ADDED", &service("c", 3));
    stream.complete(7);
    // Listing, a, b (unknown so far), c, listed.
    assert_eq!(names(&mut bench, 5).await, 2);
    let line = "object=\"Service x/b\" field=\"spec.ports[0].port\"";
    assert_eq!(bench.log.count(line), 1, "{}", bench.log.text());
    stream.event("MODIFIED", &nonsense("a", 8));
    assert_eq!(names(&mut bench, 1).await, 2);
    // A new list that holds it as it is does not make it go, but what is not in it goes.
    stream.event("ERROR", &status(410, "too old"));
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &nonsense("a", 8));
    stream.complete(9);
    assert_eq!(names(&mut bench, 3).await, 1);
    stream.event("DELETED", &nonsense("a", 10));
    assert_eq!(names(&mut bench, 1).await, 0);
    // Said once each, however often it was seen.
    assert_eq!(bench.log.count("stays in force"), 2, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_line_that_is_no_event_is_answered_by_a_new_list() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    stream.event("REWRITTEN", &service("a", 8));
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(9);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert_eq!(bench.log.count("that is no event"), 1, "{}", bench.log.text());
    stream.text(&json!("502 Bad Gateway"));
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(9);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert_eq!(bench.log.count("could not be decoded"), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_missing_right_is_named_and_asked_for_ever_more_rarely_until_it_is_granted() {
    let mut bench = Bench::start::<EndpointSlice>();
    bench.server.asked_for_stream().await.refuse(403, "User \"x\" cannot watch");
    let mut pauses = Vec::new();
    let mut last = Instant::now();
    for _ in 0..12 {
        let asked = bench.server.asked_for_stream().await;
        assert_eq!(bench.log.count("WARN") == 0, pauses.is_empty(), "{}", bench.log.text());
        asked.refuse(403, "User \"x\" cannot watch");
        pauses.push(last.elapsed());
        last = Instant::now();
    }
    bench.saw_nothing();
    // Each comes after a pause of at least 0.8 s, doubled up to 30 s, and up to as much again by
    // chance.
    let shortest = |n: u32| Duration::from_millis(800 << n).min(Duration::from_secs(30));
    for (n, pause) in (0..).zip(&pauses) {
        assert!(*pause >= shortest(n) && *pause <= shortest(n) * 2, "{n}: {pauses:?}");
    }
    let role = r#"{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]}"#;
    let said = bench.log.count(role);
    let minutes = pauses.iter().sum::<Duration>().as_secs() / 60;
    assert!(
        said > 1 && said as u64 <= minutes + 1,
        "{said} in {minutes} min\n{}",
        bench.log.text()
    );
    assert_eq!(bench.log.count("WARN"), said, "nothing else is said:\n{}", bench.log.text());

    bench.server.asked_for_stream().await.begin().complete(7);
    bench.saw(&["listing EndpointSlice", "listed EndpointSlice"]).await;
    assert_eq!(bench.log.count("serves the kind again"), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn credentials_that_are_not_accepted_are_said_to_be() {
    let mut bench = Bench::start::<Service>();
    for _ in 0..4 {
        bench.server.asked_for_stream().await.refuse(401, "Unauthorized");
    }
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    let said = "does not accept our credentials (401: Unauthorized)";
    assert_eq!(bench.log.count(said), 1, "{}", bench.log.text());
    assert_eq!(bench.log.count("serves the kind again"), 1, "{}", bench.log.text());
    assert_eq!(bench.log.text().lines().count(), 2, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_right_missing_for_what_is_optional_holds_nothing_up() {
    let mut bench = Bench::start::<Node>();
    bench.server.asked_for_stream().await.refuse(403, "User \"x\" cannot watch");
    bench.server.asked_for_stream().await.refuse(403, "User \"x\" cannot watch");
    bench.saw(&["Unavailable(Node)"]).await;
    bench.server.asked_for_stream().await.refuse(403, "User \"x\" cannot watch");
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &json!({ "metadata": { "name": "node-1", "resourceVersion": "1" } }));
    stream.complete(7);
    bench.saw(&["listing Node", "node-1", "listed Node"]).await;
    assert_eq!(bench.log.count("apiGroups: [\"\"], resources: [\"nodes\"]"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_without_service_cidrs_is_asked_again_rarely() {
    let mut bench = Bench::start::<ServiceCIDR>();
    for _ in 0..2 {
        bench.saw_nothing();
        let message = "the server could not find the resource";
        bench.server.asked_for_stream().await.refuse(404, message);
    }
    bench.saw(&["Unavailable(ServiceCidr)"]).await;
    for _ in 0..3 {
        let began = Instant::now();
        let asked = bench.server.asked_for_stream().await;
        assert_eq!(began.elapsed(), LONG_PAUSE);
        asked.refuse(404, "the server could not find the resource");
    }
    assert_eq!(bench.log.count("Kubernetes 1.33"), 1, "{}", bench.log.text());
    let mut stream = bench.server.asked_for_stream().await.begin();
    let cidr = json!({ "metadata": { "name": "kubernetes", "resourceVersion": "1" },
                       "spec": { "cidrs": ["10.96.0.0/12"] } });
    stream.event("ADDED", &cidr);
    stream.complete(7);
    // Said once, and taken back when it comes.
    bench.saw(&["listing ServiceCIDR", "kubernetes", "listed ServiceCIDR"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_starts_and_does_not_know_us_yet_is_asked_again_soon_and_without_a_word() {
    for code in [403, 404] {
        let mut bench = Bench::start::<Node>();
        // After an outage of minutes tries are rare.
        for _ in 0..12 {
            bench.server.asked_for_stream().await.reset();
        }
        bench.server.asked_for_stream().await.refuse(code, "not yet");
        let began = Instant::now();
        bench.server.asked_for_stream().await.begin().complete(7);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        bench.saw(&["listing Node", "listed Node"]).await;
        assert_eq!(bench.log.count("no answer from the API server"), 1, "{}", bench.log.text());
        assert_eq!(bench.log.count("answers again"), 1, "{}", bench.log.text());
        assert_eq!(bench.log.text().lines().count(), 2, "{}", bench.log.text());
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_one_line_and_so_is_its_end_though_no_event_comes() {
    let mut bench = Bench::start::<Service>();
    let (mut slices, mut slice_events) = watch::<EndpointSlice>(&bench.shared);
    bench.server.asked_for_stream().await.begin().complete(7);
    let mut slice_stream = slices.asked_for_stream().await.begin();
    slice_stream.complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    for _ in 0..2 {
        slice_events.recv().await.unwrap();
    }
    // One connection ends, the other breaks off.
    slice_stream.break_off();
    bench.server.asked_for_changes(7).await.reset();
    for _ in 0..8 {
        slices.asked_for_changes(7).await.reset();
        bench.server.asked_for_changes(7).await.reset();
    }
    let said = "WARN nftproxy::watch::api::outage: no answer from the API server; what is \
                programmed stays, and it is tried again error=";
    assert_eq!(bench.log.count(said), 1, "{}", bench.log.text());
    assert_eq!(bench.log.count("connection reset by peer"), 1, "{}", bench.log.text());
    assert_eq!(bench.log.count("answers again"), 0, "{}", bench.log.text());

    // The first answer ends the waiting of all.
    let answered = tokio::select! {
        asked = bench.server.asked_for_changes(7) => {
            drop(asked.begin());
            let answered = Instant::now();
            drop(slices.asked_for_changes(7).await.begin());
            answered
        }
        asked = slices.asked_for_changes(7) => {
            drop(asked.begin());
            let answered = Instant::now();
            drop(bench.server.asked_for_changes(7).await.begin());
            answered
        }
    };
    assert_eq!(answered.elapsed(), Duration::ZERO);
    // It may be another one, or restored from a backup: it is asked for everything.
    let mut stream = bench.server.asked_for_stream().await.begin();
    let mut slice_stream = slices.asked_for_stream().await.begin();
    assert!(answered.elapsed() < Duration::from_secs(2), "{:?}", answered.elapsed());
    stream.complete(5);
    slice_stream.complete(5);
    bench.saw(&["listing Service", "listed Service"]).await;
    bench.server.is_left_alone(Duration::from_secs(200)).await;
    assert_eq!(bench.log.count("answers again"), 1, "{}", bench.log.text());
    assert_eq!(bench.log.text().lines().count(), 2, "{}", bench.log.text());
    bench.saw_nothing();
    drop((stream, slice_stream));
}

#[tokio::test(start_paused = true)]
async fn an_hour_without_a_server_changes_nothing() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &service("a", 6));
    stream.complete(7);
    bench.saw(&["listing Service", "x/a", "listed Service"]).await;
    let began = Instant::now();
    stream.break_off();
    while began.elapsed() < Duration::from_secs(3600) {
        bench.server.asked().await.reset();
        bench.saw_nothing();
    }
    assert_eq!(bench.log.text().lines().count(), 1, "{}", bench.log.text());
    let asked = bench.server.asked_for_stream().await;
    let mut stream = asked.begin();
    stream.event("ADDED", &service("a", 6));
    stream.complete(9000);
    bench.saw(&["listing Service", "x/a", "listed Service"]).await;
    assert_eq!(bench.log.count("answers again"), 1, "{}", bench.log.text());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_does_not_end_in_time_is_given_up() {
    let mut bench = Bench::start::<Service>();
    let asked = bench.server.asked_for_stream().await;
    let seconds = RENEWAL.clone().find(|s| asked.says(&format!("timeoutSeconds={s}")));
    let seconds = Duration::from_secs(seconds.expect("it is asked for so long").into());
    let mut stream = asked.begin();
    stream.complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    // Longer silence than that is no watch's.
    bench.server.is_left_alone(seconds + Duration::from_secs(4)).await;
    bench.server.is_connected_to_again();
    drop(bench.server.asked_for_changes(7).await.begin());
    bench.server.asked_for_stream().await.begin().complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert_eq!(bench.log.text(), "");
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_answered_is_made_again() {
    let mut bench = Bench::start::<Service>();
    let began = Instant::now();
    let _unanswered = bench.server.asked_for_stream().await;
    let asked = bench.server.asked_for_stream().await;
    assert!(began.elapsed() < Duration::from_secs(80), "{:?}", began.elapsed());
    assert_eq!(bench.log.count("no answer from the API server"), 1, "{}", bench.log.text());
    asked.begin().complete(7);
    bench.saw(&["listing Service", "listed Service"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_every_watch_at_once_is_not_asked_in_a_loop() {
    let mut bench = Bench::start::<Service>();
    bench.server.asked_for_stream().await.begin().complete(7);
    let mut last = Instant::now();
    let mut pauses = Vec::new();
    for _ in 0..6 {
        drop(bench.server.asked_for_changes(7).await.begin());
        pauses.push(last.elapsed());
        last = Instant::now();
    }
    assert!(pauses[0] >= Duration::from_millis(800), "{pauses:?}");
    assert!(pauses[5] >= Duration::from_secs(25), "{pauses:?}");
    // One that lasted is resumed at once.
    let stream = bench.server.asked_for_changes(7).await.begin();
    tokio::time::sleep(Duration::from_secs(60)).await;
    last = Instant::now();
    drop(stream);
    bench.server.asked_for_changes(7).await.begin();
    assert_eq!(last.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn who_is_gone_by_a_list_is_nobodys_trouble_any_more() {
    let (sender, mut given) = mpsc::channel(8);
    let shared = Arc::new(Shared { notices: Notices::to(sender), ..Shared::default() });
    let (mut server, _events) = watch::<Service>(&shared);
    let mut stream = server.asked_for_stream().await.begin();
    for name in ["a", "b"] {
        stream.event("ADDED", &nonsense(name, 1));
    }
    stream.complete(7);
    for name in ["x/a", "x/b"] {
        let notice = given.recv().await.unwrap();
        assert!(matches!(notice.standing, Standing::Is(_)), "{notice:?}");
        assert_eq!(notice.service.as_str(), name);
    }
    stream.event("ERROR", &status(410, "too old"));
    let mut stream = server.asked_for_stream().await.begin();
    stream.event("ADDED", &nonsense("b", 1));
    stream.complete(9);
    let mut last = Vec::new();
    while let Ok(Some(notice)) = tokio::time::timeout(Duration::from_secs(1), given.recv()).await {
        last.push((notice.service.as_str().to_owned(), matches!(notice.standing, Standing::Gone)));
    }
    assert_eq!(last, [("x/b".to_owned(), false), ("x/a".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn a_watch_ends_with_its_receiver() {
    let (client, mut server) = server();
    let (sender, events) = mpsc::channel(64);
    let clients = std::array::from_fn(|_| client.clone());
    let run = run(clients, "node-1".to_owned(), RENEWAL, sender, Notices::default());
    let run = tokio::spawn(run);
    let asked = server.asked().await;
    drop(events);
    tokio::time::timeout(Duration::from_secs(10), run).await.expect("it ends").unwrap();
    drop(asked);
}
