//! Where a watch goes on, and where everything is listed: by another connection, from a server that knows the
//! same history or another one.

use serde_json::{Value, json};
use tokio::time::Instant;

use super::server::Stream;
use super::*;

/// A Service with an identity.
fn known(name: &str, version: u32) -> Value {
    let mut object = service(name, version);
    object["metadata"]["uid"] = json!(format!("uid of {name}"));
    object
}

/// A watch that has seen one event, of version 8, and whose stream has broken off.
async fn broken_off(what: &str) -> Bench {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(7);
    stream.event(what, &known("a", 8));
    stream.bookmark(11);
    let seen = if what == "DELETED" { "gone x/a" } else { "x/a" };
    bench.saw(&["listing Service", "listed Service", seen]).await;
    stream.break_off();
    // What the answer says is not looked at: it comes on another connection.
    drop(bench.server.asked_for_changes(11).await.begin());
    bench
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_without_a_word_on_another_connection_if_what_was_seen_last_is_repeated() {
    for what in ["MODIFIED", "DELETED"] {
        let mut bench = broken_off(what).await;
        let mut stream = bench.server.asked_for_changes(7).await.begin();
        stream.event(what, &known("a", 8));
        // On that connection it goes on where that is, whatever was heard elsewhere.
        drop(stream);
        let mut stream = bench.server.asked_for_changes(8).await.begin();
        stream.event("ADDED", &known("b", 9));
        bench.saw(&["x/b"]).await;
        drop(stream);
        let mut stream = bench.server.asked_for_changes(9).await.begin();
        stream.event("ADDED", &known("c", 10));
        bench.saw(&["x/c"]).await;
        assert_eq!(bench.log.text(), "");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_repeat_what_was_seen_last_is_asked_for_everything() {
    type Says = fn(&mut Stream);
    let otherwise: [(&str, Says); 5] = [
        ("nothing", |_| {}),
        ("another object", |stream| stream.event("MODIFIED", &known("b", 8))),
        ("another version", |stream| stream.event("MODIFIED", &known("a", 9))),
        ("another end", |stream| stream.event("DELETED", &known("a", 8))),
        ("no event", |stream| stream.text(&json!("502 Bad Gateway"))),
    ];
    for (what, says) in otherwise {
        let mut bench = broken_off("MODIFIED").await;
        let mut stream = bench.server.asked_for_changes(7).await.begin();
        says(&mut stream);
        let began = Instant::now();
        let mut listing = bench.server.asked_for_stream().await.begin();
        assert!(began.elapsed() < Duration::from_secs(5), "{what}: {:?}", began.elapsed());
        listing.complete(5);
        bench.saw(&["listing Service", "listed Service"]).await;
        assert_eq!(bench.log.count("does not repeat"), 1, "{what}: {}", bench.log.text());
        assert_eq!(bench.log.text().lines().count(), 1, "{what}: {}", bench.log.text());
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_remembers_less_is_asked_for_everything() {
    let mut bench = broken_off("MODIFIED").await;
    bench.server.asked_for_changes(7).await.refuse(410, "too old resource version: 7 (12)");
    bench.server.asked_for_stream().await.begin().complete(12);
    bench.saw(&["listing Service", "listed Service"]).await;
    assert_eq!(bench.log.text(), "");
}

#[tokio::test(start_paused = true)]
async fn another_connection_without_an_event_since_the_list_is_asked_for_everything() {
    let mut bench = Bench::start::<Service>();
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.event("ADDED", &known("a", 6));
    stream.complete(7);
    bench.saw(&["listing Service", "x/a", "listed Service"]).await;
    // As properly as if its time were up, but what follows is another connection.
    drop(stream);
    bench.server.is_connected_to_again();
    let mut stream = bench.server.asked_for_changes(7).await.begin();
    stream.event("ADDED", &known("b", 8));
    let mut stream = bench.server.asked_for_stream().await.begin();
    stream.complete(5);
    bench.saw(&["listing Service", "listed Service"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_proxy_without_a_server_behind_it_makes_its_connection_another_one() {
    for code in [502, 503, 504] {
        let mut bench = Bench::start::<Service>();
        bench.server.asked_for_stream().await.begin().complete(7);
        bench.saw(&["listing Service", "listed Service"]).await;
        bench.server.asked_for_changes(7).await.refuse(code, "nobody there");
        drop(bench.server.asked_for_changes(7).await.begin());
        bench.server.asked_for_stream().await.begin().complete(5);
        bench.saw(&["listing Service", "listed Service"]).await;
    }
}
