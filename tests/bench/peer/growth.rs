//! The figures of several sizes, one beside the other: how each of the two grows with the cluster.
//!
//! Each size is measured by a process of its own, with a time limit, and what it saw of each proxy is written
//! down at once: a size that fails or takes too long costs no other its figures.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use plotters::coord::combinators::IntoLogRange as _;
use plotters::prelude::*;

use super::field;
use super::report::{Figures, machine, significant};

/// Asks for the measurement of one size, whose figures are told on the standard output.
pub(crate) const ONE: &str = "--growth-of";

/// What a line with figures begins with: one number for each curve, and whether it works.
const TOLD: &str = "figures:";

/// The longest that a size may take. kube-proxy has ten minutes for its first sync, and changes that no packet
/// follows take half a minute each.
const PATIENCE: Duration = Duration::from_secs(45 * 60);

/// The figures of one proxy, one for each curve.
type Told = [f64; CURVES.len()];

/// What was seen at one size; NaN where nothing was.
struct Size {
    services: usize,
    endpoints: usize,
    ours: Told,
    peer: Told,
}

/// Picks one of the two.
type OfWhom = fn(&Size) -> &Told;

/// One figure of each run.
struct Curve {
    what: &'static str,
    unit: &'static str,
    of: fn(&Figures) -> f64,
}

const CURVES: [Curve; 7] = [
    Curve { what: "process start → everything programmed", unit: "s", of: |f| f.ready },
    Curve { what: "first sync, by the proxy's own word", unit: "s", of: |f| f.first_sync },
    Curve {
        what: "one endpoint more, acknowledged → packet, p50",
        unit: "ms",
        of: |f| f.change[0] * 1e3,
    },
    Curve { what: "peak resident memory", unit: "MB", of: |f| f.peak_mb },
    Curve { what: "a new connection / floor table", unit: "×", of: |f| f.syn / f.floor },
    Curve { what: "bytes from the API server until then", unit: "MB", of: |f| f.start_bytes / 1e6 },
    Curve { what: "restart with nothing to change, until synced", unit: "s", of: |f| f.restart },
];

/// Measures all sizes; prints and writes the table behind each. Returns whether nftproxy did all it should.
pub(crate) fn run(sizes: impl Iterator<Item = (usize, usize)>) -> bool {
    let mut seen = Vec::new();
    let mut works = true;
    for (services, endpoints) in sizes {
        let mut told = measured(services, endpoints).into_iter();
        let (ours, did) = told.next().unwrap_or(([f64::NAN; CURVES.len()], false));
        let (peer, _) = told.next().unwrap_or(([f64::NAN; CURVES.len()], false));
        works &= did;
        seen.push(Size { services, endpoints, ours, peer });
        println!("{}", markdown(&seen));
        write(&seen);
    }
    works
}

/// Has a size measured by another process. Returns what it told of each proxy, and whether that one works.
fn measured(services: usize, endpoints: usize) -> Vec<(Told, bool)> {
    let program = std::env::current_exe().expect("the path of this program");
    let mut child = Command::new(program)
        .args([ONE, &services.to_string(), &endpoints.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .expect("starting a measurement");
    let process = Pid::from_raw(child.id().cast_signed());
    let (running, ended) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            println!("{services} × {endpoints} took more than {PATIENCE:?}, and is given up");
            // What it started ends with it.
            let _ = kill(process, Signal::SIGKILL);
        }
    });
    let mut told = Vec::new();
    let output = child.stdout.take().expect("piped");
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        match line.strip_prefix(TOLD).and_then(told_by) {
            Some(figures) => told.push(figures),
            None => println!("{line}"),
        }
    }
    drop(running);
    watchdog.join().expect("it waits for no more than that");
    let status = child.wait().expect("a child of ours");
    if !status.success() {
        println!("{services} × {endpoints}: {status}");
        field::remove(child.id());
    }
    told
}

fn told_by(line: &str) -> Option<(Told, bool)> {
    let (works, figures) = line.trim().split_once(' ')?;
    let figures: Vec<f64> = figures.split(' ').filter_map(|text| text.parse().ok()).collect();
    Some((figures.try_into().ok()?, works == "true"))
}

/// Tells whoever started this process what was seen of a proxy.
pub(crate) fn tell(figures: &Figures) {
    let told = CURVES.iter().map(|curve| (curve.of)(figures).to_string()).collect::<Vec<_>>();
    println!("{TOLD} {} {}", figures.works(), told.join(" "));
}

/// Leaves the table and the plot in `tests/bench/results`.
fn write(sizes: &[Size]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/results");
    let text = format!(
        "# How it grows with the cluster\n\n{} Made by `tests/bench/run --growth`; each size with a \
         control plane of its own, first nftproxy, then kube-proxy. –: not within the ten minutes that \
         each has to program everything.\n\n{}\n![plot](growth.svg)\n",
        machine(),
        markdown(sizes)
    );
    std::fs::write(folder.join("growth.md"), text).expect("the folder is there");
    plot(&folder.join("growth.svg"), sizes).expect("the same");
}

fn markdown(sizes: &[Size]) -> String {
    let mut text = String::from("| nftproxy : kube-proxy |");
    for size in sizes {
        let _ = write!(text, " {} × {} |", size.services, size.endpoints);
    }
    text.push_str("\n| --- |");
    text.push_str(&" ---: |".repeat(sizes.len()));
    for (index, Curve { what, unit, .. }) in CURVES.iter().enumerate() {
        let _ = write!(text, "\n| {what} ({unit}) |");
        for size in sizes {
            let [ours, peer] = [size.ours[index], size.peer[index]].map(significant);
            let _ = write!(text, " {ours} : {peer} |");
        }
    }
    text.push('\n');
    text
}

/// Each figure against the number of Services, both axes logarithmic. A line joins the sizes that have the
/// same number of endpoints for each.
fn plot(path: &Path, sizes: &[Size]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, (1000, 1280)).into_drawing_area();
    root.fill(&WHITE)?;
    let first = sizes.iter().map(|size| size.services).min().unwrap_or(1);
    let last = sizes.iter().map(|size| size.services).max().unwrap_or(10);
    let mut by_endpoints = BTreeMap::<usize, Vec<&Size>>::new();
    for size in sizes {
        by_endpoints.entry(size.endpoints).or_default().push(size);
    }
    for alike in by_endpoints.values_mut() {
        alike.sort_by_key(|size| size.services);
    }
    for (area, (index, curve)) in root.split_evenly((4, 2)).iter().zip(CURVES.iter().enumerate()) {
        let points = |sizes: &[&Size], of_whom: OfWhom| -> Vec<(f64, f64)> {
            let point = |size: &&Size| (thousands(size.services), of_whom(size)[index]);
            sizes.iter().map(point).filter(|(_, y)| *y > 0.0).collect()
        };
        let all = || sizes.iter().flat_map(|size| [size.ours[index], size.peer[index]]);
        let all = || all().filter(|y| *y > 0.0);
        let low = all().fold(f64::INFINITY, f64::min) * 0.7;
        let high = all().fold(0.0, f64::max) * 1.4;
        let (low, high) = if low < high { (low, high) } else { (0.1, 1.0) };
        let mut chart = ChartBuilder::on(area)
            .caption(
                format!("{} ({})", curve.what.replace('→', "to"), curve.unit),
                ("sans-serif", 17),
            )
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d(
                (thousands(first) * 0.8..thousands(last) * 1.25).log_scale(),
                (low..high).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_desc("thousand Services")
            .x_label_formatter(&|x| significant(*x))
            .y_label_formatter(&|y| significant(*y))
            .light_line_style(WHITE)
            .draw()?;
        let whose: [(_, OfWhom, _); 2] = [
            ("nftproxy", |size| &size.ours, RGBColor(20, 140, 90)),
            ("kube-proxy", |size| &size.peer, RGBColor(190, 80, 40)),
        ];
        for (name, of_whom, colour) in whose {
            for (line, (endpoints, alike)) in by_endpoints.iter().enumerate() {
                let points = points(alike, of_whom);
                let drawn = chart
                    .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
                if line == 0 {
                    drawn.label(name).legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                    });
                }
                let circles = points.iter().map(|at| Circle::new(*at, 3, colour.filled()));
                chart.draw_series(circles)?;
                // Which line it is, where there are several.
                let text = format!("× {endpoints}");
                let style = ("sans-serif", 11).into_font().color(&colour);
                let last = points.last().filter(|_| by_endpoints.len() > 1);
                chart.draw_series(last.map(|at| {
                    EmptyElement::at(*at) + Text::new(text.clone(), (5, -12), style.clone())
                }))?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    root.present()?;
    Ok(())
}

fn thousands(services: usize) -> f64 {
    f64::from(u32::try_from(services).expect("fewer than 4 billion")) / 1e3
}
