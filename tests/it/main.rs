//! The one integration-test binary. Tiers: what needs no privileges (render, ledger, tidy), what
//! needs network namespaces (parity, packets), and what needs a control plane (e2e).

#![allow(
    clippy::unwrap_used,
    clippy::format_push_string,
    clippy::needless_for_each,
    clippy::disallowed_methods,
    clippy::format_collect,
    clippy::items_after_statements,
    reason = "tests fail by panicking, read the clock, and are written for reading"
)]

mod adopt;
mod agree;
mod arrive;
mod between;
mod broken_api;
mod commands;
mod config;
mod conntrack;
mod control_plane;
mod counters;
mod deploy;
mod docs;
mod drift;
mod e2e;
mod events;
mod example;
mod explain;
mod features;
mod flips;
mod fuzz;
mod hardening;
mod health;
mod history;
mod host;
mod hostile;
mod http;
mod inside;
mod interpret;
mod kubectl;
mod ledger;
mod live;
mod load;
mod metrics;
mod model;
mod monitoring;
mod namespace;
mod net;
mod objects;
mod operator;
mod packets;
mod parity;
mod protobuf;
mod render;
mod rest;
mod restart;
mod scenario;
mod serve;
mod soak;
mod takeover;
mod tidy;
mod tools;
mod trouble;
mod unheard;
mod upgrade;
mod wakeups;
mod walkthrough;
mod watches;
mod wire;
