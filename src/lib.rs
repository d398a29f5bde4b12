//! nftproxy: a Kubernetes service proxy on nftables.
//!
//! It watches Services, EndpointSlices, its Node and ServiceCIDRs, and keeps one nftables table for
//! each address family equal to what they ask for. It is never in the data path. Everything flows one
//! way:
//!
//! ```text
//! watch          Kubernetes API, or a directory of manifests, as one stream of model::Event
//!   → state      what is known, and which contributions an event made stale
//!   → selection  which endpoints may answer
//!   → frontend   what clients dial, and which Service owns it
//!   → contribution   the elements one object asks for
//!   → ledger     what changes in the tables since the last commit
//!   → nft::transaction   ordered, typed operations
//!   → nft::text (templates/, snapshots)  |  nft::netlink (one batch) → kernel
//! ```
//!
//! One thread goes that way, `program`: it says when, and `reconcile` what is committed. What the kernel
//! refuses of an object is set aside by `quarantine`; what others change in the tables is put right by
//! `drift`.
//!
//! Beside that way, `conntrack` removes UDP flows that a commit left without their endpoint, and
//! `takeover` what kube-proxy left on the node. `account` keeps what health checks and metrics tell of
//! the last commit, and `connections` what the kernel counted: `status` hands it on to `server`, which
//! answers by the rules of `health`. What an operator asks of the running program goes by `recent` (the
//! last batches), `journal` (the last lines of the log) and `inspect` (a copy of the state), and is put
//! into words by `commands`.
//!
//! Read the modules in that order. Rings, checked by `tests/it/tidy.rs`: `model` knows nothing but
//! plain values; everything from `state` to `nft::transaction` is pure (no I/O, clock, randomness or
//! Kubernetes type); `watch`, `nft::netlink`, `conntrack`, `host` and `server` each touch one outside
//! thing; `reconcile`, `program`, `status`, `app`, `config` and `cli` wire them up.

pub mod model;

pub mod account;
pub mod connections;
pub mod contribution;
pub mod frontend;
pub mod health;
pub mod ledger;
pub mod maglev;
pub mod selection;
pub mod settings;
pub mod slots;
pub mod state;

pub mod nft;

pub mod conntrack;
mod nlmsg;

pub mod app;
pub mod cli;
pub mod commands;
pub mod config;
pub mod drift;
pub mod host;
pub mod inspect;
pub mod journal;
pub mod metrics;
pub mod program;
pub mod quarantine;
pub mod recent;
pub mod reconcile;
pub mod server;
pub mod status;
pub mod takeover;
pub mod watch;

/// What only fuzz targets reach (`tests/fuzz`).
#[cfg(fuzzing)]
pub mod fuzzing {
    /// Reads bytes as every kind of answer of the kernel that is read by code of our own.
    pub fn netlink(bytes: &[u8]) {
        crate::conntrack::fuzz(bytes);
        for message in crate::nlmsg::messages(bytes) {
            let _ = (crate::nlmsg::kind(message), crate::nlmsg::flags(message));
            for (_, value) in crate::nlmsg::attributes(&message[crate::nlmsg::HEADER..]) {
                let _ = crate::nlmsg::find(value, 1);
                for family in crate::model::Family::BOTH {
                    let _ = crate::nft::connection::Connection::from_bytes(family, value);
                }
            }
        }
    }
}
