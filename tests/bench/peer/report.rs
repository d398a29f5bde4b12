//! The figures of a run as a table of ratios, and as a plot beside it.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::requests::{CLIENTS, KEPT};
use super::wakeups::listed;

/// What was seen of one proxy. Times are in seconds but for `syn`, which is in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) ready: f64,
    pub(crate) first_sync: f64,
    pub(crate) next_sync: f64,
    /// Median and 99th percentile, since the server acknowledged a write; and since another client of
    /// the server was told of it.
    pub(crate) change: [f64; 2],
    pub(crate) change_told: [f64; 2],
    /// And how long no packet could have shown it, as the sender had not its turn.
    pub(crate) change_blind: [f64; 2],
    /// How late a thread that only sleeps woke meanwhile: 99th percentile and worst.
    pub(crate) change_late: [f64; 2],
    pub(crate) missed: usize,
    pub(crate) storm_rate: f64,
    /// The same in the storm.
    pub(crate) storm: [f64; 2],
    pub(crate) storm_told: [f64; 2],
    pub(crate) storm_blind: [f64; 2],
    pub(crate) storm_late: [f64; 2],
    /// By the proxy's own word, from taking in an event until it was in force; NaN if it says nothing.
    pub(crate) storm_inside: [f64; 2],
    pub(crate) storm_cpu: f64,
    pub(crate) peak_mb: f64,
    /// What the API server sent, with all that carries it: until the first sync was done, and for one
    /// change in the storm.
    pub(crate) start_bytes: f64,
    pub(crate) change_bytes: f64,
    pub(crate) syn: f64,
    /// The same by a table of one map and masquerading, by one that gives random ports, and by routing
    /// alone; in turn with it.
    pub(crate) floor: f64,
    pub(crate) random: f64,
    pub(crate) routing: f64,
    /// Share of the SYNs that arrived.
    pub(crate) programmed: f64,
    /// Gigabits a second to an endpoint, and to it by way of its Service.
    pub(crate) direct: f64,
    pub(crate) by_service: f64,
    /// Requests a second over established connections: to an endpoint, to another one, and by way of a
    /// Service. How far apart the first two are is noise.
    pub(crate) requests: [f64; 3],
    /// The same with a connection for each, to endpoints and by way of their Services.
    pub(crate) calls: [f64; 2],
    pub(crate) wakeups: f64,
    /// Seconds from a start that finds everything as it is to the end of its sync, and the operations of that;
    /// NaN if it does not say how many.
    pub(crate) restart: f64,
    pub(crate) restart_operations: f64,
}

impl Figures {
    /// Of a proxy that did not get ready.
    pub(crate) fn unknown() -> Self {
        let two = [f64::NAN; 2];
        Self {
            ready: f64::NAN,
            first_sync: f64::NAN,
            next_sync: f64::NAN,
            change: two,
            change_told: two,
            storm: two,
            storm_told: two,
            storm_cpu: f64::NAN,
            start_bytes: f64::NAN,
            syn: f64::NAN,
            by_service: f64::NAN,
            requests: [f64::NAN; 3],
            calls: two,
            wakeups: f64::NAN,
            restart: f64::NAN,
            restart_operations: f64::NAN,
            ..Self::default()
        }
    }

    /// Whether everything was programmed, every change seen, and nothing done again at a restart.
    pub(crate) fn works(&self) -> bool {
        let again = self.restart_operations > 0.0;
        self.programmed > 0.99 && self.missed == 0 && !again
    }
}

pub(crate) struct Report {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) quick: bool,
    pub(crate) ours: Figures,
    pub(crate) peer: Figures,
}

struct Row {
    what: &'static str,
    unit: &'static str,
    ours: f64,
    peer: f64,
    /// What was to be reached, and whether it was.
    target: Option<(&'static str, bool)>,
}

impl Report {
    /// Whether both programmed everything; kube-proxy may have run out of time.
    pub(crate) fn works(&self) -> bool {
        self.ours.works() && (self.peer.ready.is_nan() || self.peer.programmed > 0.99)
    }

    /// The longest that a restart may take.
    fn longest_restart(&self) -> f64 {
        if self.services * self.endpoints > 50_000 { 4.0 } else { 1.0 }
    }

    fn rows(&self) -> Vec<Row> {
        let (ours, peer) = (&self.ours, &self.peer);
        let row = |what, unit, of: fn(&Figures) -> f64, target| Row {
            what,
            unit,
            ours: of(ours),
            peer: of(peer),
            target,
        };
        let lag = |what, of: fn(&Figures) -> f64, most: Option<(f64, &'static str)>| {
            row(what, "ms", of, most.map(|(most, said)| (said, of(ours) <= most)))
        };
        let as_routed = |what, of: fn(&Figures) -> f64| {
            row(what, "", of, Some(("1 within noise", of(ours) > 0.95)))
        };
        vec![
            row(
                "process start → everything programmed",
                "s",
                |f| f.ready,
                Some(("≥ 15× faster", peer.ready / ours.ready >= 15.0)),
            ),
            row(
                "first sync, by the proxy's own word",
                "s",
                |f| f.first_sync,
                Some(("≥ 100× faster", peer.first_sync / ours.first_sync >= 100.0)),
            ),
            lag(
                "one endpoint more, acknowledged → packet, p50",
                |f| f.change[0] * 1e3,
                Some((10.0, "≤ 10 ms")),
            ),
            lag("the same, p99", |f| f.change[1] * 1e3, Some((30.0, "≤ 30 ms"))),
            lag("the same, another client told → packet, p50", |f| f.change_told[0] * 1e3, None),
            lag("the same, p99", |f| f.change_told[1] * 1e3, None),
            lag("acknowledged → packet under 200 changes/s, p50", |f| f.storm[0] * 1e3, None),
            lag("the same, p99", |f| f.storm[1] * 1e3, Some((50.0, "≤ 50 ms"))),
            lag("another client told → packet meanwhile, p50", |f| f.storm_told[0] * 1e3, None),
            lag("the same, p99", |f| f.storm_told[1] * 1e3, None),
            row(
                "CPU meanwhile, of one core",
                "%",
                |f| f.storm_cpu * 100.0,
                Some(("≤ 15 %", ours.storm_cpu <= 0.15)),
            ),
            row(
                "peak resident memory",
                "MB",
                |f| f.peak_mb,
                Some(("≤ 1/4", ours.peak_mb <= peer.peak_mb / 4.0)),
            ),
            row(
                "a new connection through the node / floor table",
                "",
                |f| f.syn / f.floor,
                Some(("≤ 1.10, < kube-proxy", {
                    let ratio = ours.syn / ours.floor;
                    ratio <= 1.1 && ratio < peer.syn / peer.floor
                })),
            ),
            as_routed("established TCP by ClusterIP / by routing", |f| f.by_service / f.direct),
            as_routed("requests/s over established connections, the same", |f| {
                let [routed, again, by_service] = f.requests;
                by_service * 2.0 / (routed + again)
            }),
            row(
                "requests/s with a connection for each, the same",
                "",
                |f| f.calls[1] / f.calls[0],
                None,
            ),
            row(
                "restart with nothing to change: process start → synced",
                "s",
                |f| f.restart,
                Some(("≤ 1 s, ≤ 4 s for 5,000 × 50", ours.restart <= self.longest_restart())),
            ),
            row(
                "operations of that",
                "",
                |f| f.restart_operations,
                Some(("0", ours.restart_operations == 0.0)),
            ),
            row(
                "wake-ups a second when idle",
                "/s",
                |f| f.wakeups,
                Some(("≤ what is listed", ours.wakeups <= listed())),
            ),
            row("sent by the API server until the first sync", "MB", |f| f.start_bytes / 1e6, None),
            row("sent by the API server for one change", "kB", |f| f.change_bytes / 1e3, None),
        ]
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "## {} Services × {} endpoints\n\n| | nftproxy | kube-proxy | ratio | target | |\n\
             | --- | ---: | ---: | ---: | --- | --- |\n",
            self.services, self.endpoints
        );
        for row in self.rows() {
            // Targets are for the sizes that they name.
            let (target, reached) = match row.target.filter(|_| !self.quick) {
                Some((target, true)) => (target, "reached"),
                Some((target, false)) => (target, "missed"),
                None => ("", ""),
            };
            let _ = writeln!(
                text,
                "| {} | {} {u} | {} {u} | {} | {target} | {reached} |",
                row.what,
                significant(row.ours),
                significant(row.peer),
                significant(row.ours / row.peer),
                u = row.unit,
            );
        }
        let _ = write!(
            text,
            "\nMicroseconds of a new connection through the node, through a node with a floor table (one \
             map, masquerade), through one with random ports (as both proxies give them), through \
             one with none, in turn: nftproxy {:.2}, {:.2}, {:.2}, {:.2}; kube-proxy {:.2}, {:.2}, \
             {:.2}, {:.2}. An incremental sync of kube-proxy takes {} ms (median, its own \
             word). In the storm, nftproxy had half of the events in force within {} ms of taking them \
             in, and 99 of 100 within {} ms (bounds of its own histogram). The bench's sender itself \
             had to wait for its turn before the datagram that showed a change, p99: {} ms, in the \
             storm {} ms; kube-proxy {}, {}. A thread that only sleeps woke late by {} ms (p99; worst \
             {}), in the storm by {} ({}): a change waits for several threads one after the other, each \
             as late as that. In the storm the API server took {:.0} and {:.0} changes a second. SYNs that \
             arrived, of one to every ClusterIP: {:.1} %, {:.1} %. Changes that no packet followed \
             within 30 s: {}, {}. Requests of 64 bytes a second, {KEPT} at once over connections that stay, \
             by routing to one endpoint, to another (noise) and by ClusterIP: nftproxy {:.0}, {:.0}, \
             {:.0}; kube-proxy {:.0}, {:.0}, {:.0}. {CLIENTS} at once with a connection for each, by \
             routing and by ClusterIP, which is masqueraded here, too: {:.0}, {:.0}; {:.0}, {:.0}. What wakes \
             nftproxy at rest is listed in `deploy/docs/observe.md`: {:.2} a second in all.\n",
            self.ours.syn,
            self.ours.floor,
            self.ours.random,
            self.ours.routing,
            self.peer.syn,
            self.peer.floor,
            self.peer.random,
            self.peer.routing,
            significant(self.peer.next_sync * 1e3),
            significant(self.ours.storm_inside[0] * 1e3),
            significant(self.ours.storm_inside[1] * 1e3),
            significant(self.ours.change_blind[1] * 1e3),
            significant(self.ours.storm_blind[1] * 1e3),
            significant(self.peer.change_blind[1] * 1e3),
            significant(self.peer.storm_blind[1] * 1e3),
            significant(self.ours.change_late[0] * 1e3),
            significant(self.ours.change_late[1] * 1e3),
            significant(self.ours.storm_late[0] * 1e3),
            significant(self.ours.storm_late[1] * 1e3),
            self.ours.storm_rate,
            self.peer.storm_rate,
            self.ours.programmed * 100.0,
            self.peer.programmed * 100.0,
            self.ours.missed,
            self.peer.missed,
            self.ours.requests[0],
            self.ours.requests[1],
            self.ours.requests[2],
            self.peer.requests[0],
            self.peer.requests[1],
            self.peer.requests[2],
            self.ours.calls[0],
            self.ours.calls[1],
            self.peer.calls[0],
            self.peer.calls[1],
            listed(),
        );
        text
    }

    pub(crate) fn print(&self) {
        println!("{}", self.markdown());
    }

    /// Leaves the table and the plot in `tests/bench/results`, but for a quick run, whose figures say
    /// nothing.
    pub(crate) fn write(&self) {
        if self.quick {
            return;
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/results");
        let name = format!("{}x{}", self.services, self.endpoints);
        let text = format!(
            "# nftproxy beside kube-proxy\n\n{} Made by `tests/bench/run`: ratios are the figure, as the \
             machine may have been used by others.\n\n{}\n![plot]({name}.svg)\n",
            machine(),
            self.markdown()
        );
        std::fs::write(folder.join(format!("{name}.md")), text).expect("the folder is there");
        std::fs::write(folder.join(format!("{name}.svg")), self.svg()).expect("the same");
    }

    /// Bars on a logarithmic scale: how many times less the program takes.
    fn svg(&self) -> String {
        let rows: Vec<_> =
            self.rows().into_iter().filter(|row| row.ours > 0.0 && row.peer > 0.0).collect();
        let height = 60 + 34 * rows.len();
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"12\" y=\"24\" font-size=\"15\">{} Services × {} endpoints: kube-proxy ÷ \
             nftproxy (logarithmic)</text>\n",
            self.services, self.endpoints
        );
        let scale = |ratio: f64| 330.0 + 150.0 * ratio.max(0.1).log10();
        for (ratio, label) in [(1.0, "1×"), (10.0, "10×"), (100.0, "100×"), (1000.0, "1000×")] {
            let x = scale(ratio);
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.0}\" y1=\"38\" x2=\"{x:.0}\" y2=\"{}\" stroke=\"#ddd\"/>\
                 <text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\" fill=\"#888\">{label}</text>",
                height - 18,
                height - 4
            );
        }
        for (index, row) in rows.iter().enumerate() {
            let ratio = row.peer / row.ours;
            let (y, from, to) = (44 + 34 * index, scale(1.0), scale(ratio));
            let (x, width) = (from.min(to), (to - from).abs().max(1.0));
            let _ = writeln!(
                svg,
                "<text x=\"12\" y=\"{}\">{}</text>\
                 <rect x=\"{x:.0}\" y=\"{y}\" width=\"{width:.0}\" height=\"20\" fill=\"#2a7\"/>\
                 <text x=\"{:.0}\" y=\"{}\">{}×  ({} {u} : {} {u})</text>",
                y + 15,
                row.what.replace("→", "to"),
                x + width + 6.0,
                y + 15,
                significant(ratio),
                significant(row.ours),
                significant(row.peer),
                u = row.unit,
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// Where it was measured, and what.
pub(crate) fn machine() -> String {
    let kernel = said("uname", &["-sr"]);
    let cpu = said("sh", &["-c", "grep -m1 'model name' /proc/cpuinfo | cut -d: -f2"]);
    let cores = said("nproc", &[]);
    let (date, nft) = (said("date", &["+%F"]), said("nft", &["--version"]));
    let kube_proxy = super::control_plane::find("kube-proxy").expect("it was run");
    let version = said(&kube_proxy.display().to_string(), &["--version"]);
    format!(
        "{date}; {kernel}; {cores} × {cpu}; {nft}; kube-proxy: {version}, mode nftables, its default \
         configuration."
    )
}

/// Three digits that count.
pub(crate) fn significant(figure: f64) -> String {
    match figure.abs() {
        f if !f.is_finite() => "–".into(),
        f if f >= 100.0 => format!("{figure:.0}"),
        f if f >= 10.0 => format!("{figure:.1}"),
        f if f >= 1.0 => format!("{figure:.2}"),
        _ => format!("{figure:.3}"),
    }
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or_else(
        |_| "unknown".into(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
