//! The figures of several sizes, one beside the other: how each of the two grows with the cluster.

use std::fmt::Write as _;
use std::path::Path;

use plotters::coord::combinators::IntoLogRange as _;
use plotters::prelude::*;

use super::report::{Figures, machine, significant};

/// What was seen at one size.
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) ours: Figures,
    pub(crate) peer: Figures,
}

/// One figure of each run.
struct Curve {
    what: &'static str,
    unit: &'static str,
    of: fn(&Figures) -> f64,
}

const CURVES: [Curve; 6] = [
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
];

/// Prints the table.
pub(crate) fn print(sizes: &[Size]) {
    println!("{}", markdown(sizes));
}

/// Leaves the table and the plot in `tests/bench/results`.
pub(crate) fn write(sizes: &[Size]) {
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
    for Curve { what, unit, of } in &CURVES {
        let _ = write!(text, "\n| {what} ({unit}) |");
        for size in sizes {
            let [ours, peer] = [of(&size.ours), of(&size.peer)].map(known);
            let _ = write!(text, " {ours} : {peer} |");
        }
    }
    text.push('\n');
    text
}

fn known(figure: f64) -> String {
    if figure.is_finite() { significant(figure) } else { "–".into() }
}

/// Each figure against the number of Services, both axes logarithmic.
fn plot(path: &Path, sizes: &[Size]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, (1000, 960)).into_drawing_area();
    root.fill(&WHITE)?;
    let first = sizes.iter().map(|size| size.services).min().unwrap_or(1);
    let last = sizes.iter().map(|size| size.services).max().unwrap_or(10);
    for (area, curve) in root.split_evenly((3, 2)).iter().zip(&CURVES) {
        let points = |of_whom: fn(&Size) -> &Figures| -> Vec<(f64, f64)> {
            let point = |size: &Size| (thousands(size.services), (curve.of)(of_whom(size)));
            sizes.iter().map(point).filter(|(_, y)| *y > 0.0).collect()
        };
        let (ours, peer) = (points(|size| &size.ours), points(|size| &size.peer));
        let all = || ours.iter().chain(&peer).map(|(_, y)| *y);
        let low = all().fold(f64::INFINITY, f64::min) * 0.7;
        let high = all().fold(0.0, f64::max) * 1.4;
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
        for (name, points, colour) in
            [("nftproxy", ours, RGBColor(20, 140, 90)), ("kube-proxy", peer, RGBColor(190, 80, 40))]
        {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            chart.draw_series(points.into_iter().map(|at| Circle::new(at, 3, colour.filled())))?;
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
