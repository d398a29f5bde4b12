//! The one integration-test binary. Tiers: what needs no privileges (render, ledger, tidy), what
//! needs network namespaces (parity, packets), and what needs a control plane (e2e).

mod adopt;
mod ledger;
mod model;
mod namespace;
mod parity;
mod render;
mod tidy;
