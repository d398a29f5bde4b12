//! `nftproxy events`: what is being programmed, and why, as it happens.
//!
//! The daemon keeps its last batches; this asks for those behind the last one it saw, and the daemon
//! answers as soon as there is one. So nothing is lost between two answers, unless a great deal happens.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::time::Duration;

use tracing::warn;

use super::daemon::Daemon;
use super::text::{Paint, count, wrap};
use super::{CommandError, Output};
use crate::config::Config;
use crate::recent::{BatchRow, RecentRows};

/// How long the daemon is asked to wait for news.
const WAIT: Duration = Duration::from_secs(20);

/// How long an answer may take beyond that.
const GRACE: Duration = Duration::from_secs(10);

/// The pause before a daemon that is gone is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// How many of the last batches to begin with.
    pub last: usize,
    /// Whether to go on with new ones.
    pub follow: bool,
    /// The form.
    pub output: Output,
}

/// Tells each batch, until the listener has enough.
pub async fn events<E>(
    config: &Config,
    question: Question,
    mut tell: impl FnMut(&str) -> Result<ControlFlow<()>, E>,
) -> Result<(), E>
where
    E: From<CommandError>,
{
    let daemon = Daemon::of(config).map_err(CommandError::from)?;
    let recent: RecentRows =
        daemon.value("/debug/recent", GRACE).await.map_err(CommandError::from)?;
    let RecentRows { mut started, newest: mut seen, mut batches, .. } = recent;
    batches.drain(..batches.len().saturating_sub(question.last));
    let mut gone = false;
    loop {
        for batch in &batches {
            if tell(&written(batch, question.output))?.is_break() {
                return Ok(());
            }
        }
        if !question.follow {
            return Ok(());
        }
        let path = format!("/debug/recent?after={seen}&wait={}", WAIT.as_secs());
        match daemon.value::<RecentRows>(&path, WAIT + GRACE).await {
            Err(error) => {
                if !std::mem::replace(&mut gone, true) {
                    warn!("{error}; waiting for it");
                }
                batches.clear();
                tokio::time::sleep(RETRY).await;
            }
            Ok(rows) if rows.started != started => {
                warn!("nftproxy was started anew");
                (started, seen, gone) = (rows.started, 0, false);
                batches.clear();
            }
            Ok(rows) => {
                gone = false;
                let first = rows.batches.first().map_or(seen + 1, |batch| batch.number);
                if first > seen + 1 {
                    warn!(batches = first - seen - 1, "more happened than is kept; not shown");
                }
                (seen, batches) = (rows.newest.max(seen), rows.batches);
            }
        }
    }
}

fn written(batch: &BatchRow, output: Output) -> String {
    match output {
        Output::Json => serde_json::to_string(batch).expect("plain values are JSON") + "\n",
        Output::Text => text(batch),
    }
}

fn text(batch: &BatchRow) -> String {
    let mut head =
        format!("{} {}", batch.at.strftime("%H:%M:%S%.3f"), Paint::Bold.on(&batch.cause));
    if let Some(author) = &batch.author {
        let _ = write!(head, " after {}", Paint::Attention.on(author));
    }
    if !batch.objects.is_empty() {
        let _ = write!(head, ": {}", batch.objects.join(", "));
        if batch.more_objects > 0 {
            let _ = write!(head, " and {} more", batch.more_objects);
        }
    }
    let mut out = wrap(&head, 0);
    if let Some(error) = &batch.error {
        out += &wrap(&format!("{} {error}", Paint::Bad.on("failed:")), 4);
        return out;
    }
    let mut numbers = format!(
        "{}, {} bytes, {} ms",
        count(batch.operations, "operation"),
        batch.bytes,
        batch.took_ms
    );
    if let Some(ms) = batch.event_to_kernel_ms {
        let _ = write!(numbers, "; in force {ms} ms after the event");
    }
    out += &wrap(&numbers, 4);
    for change in &batch.changes {
        let _ = writeln!(out, "    {change}");
    }
    if batch.more_changes > 0 {
        let _ = writeln!(
            out,
            "    and {} more {}",
            batch.more_changes,
            if batch.more_changes == 1 { "operation" } else { "operations" }
        );
    }
    out
}
