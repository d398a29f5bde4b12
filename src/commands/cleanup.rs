//! `nftproxy cleanup`: removes our tables, or what kube-proxy left behind.

use tracing::{error, info, warn};

use super::CommandError;
use super::tables::TablesError;
use crate::host;
use crate::model::Family;
use crate::nft::dataplane::LOOPBACK_GUARD;
use crate::nft::kernel::{ApplyError, Kernel as _};
use crate::nft::names::{STAND_IN, TABLE};
use crate::nft::netlink::NetlinkKernel;
use crate::nft::transaction::{Op, Transaction};
use crate::takeover::{self, Purpose};

/// Removes what can be removed: one table that cannot go keeps nobody from removing the other.
pub fn own() -> Result<(), CommandError> {
    host::check_privileges()?;
    let mut kernel = NetlinkKernel::open().map_err(TablesError::from)?;
    let guarded = kernel.has_rule(Family::V4, LOOPBACK_GUARD).unwrap_or(false);
    let mut errors = Vec::new();
    for family in Family::BOTH {
        let deletion = Transaction { ops: vec![Op::DeleteTable(family)] };
        let outcomes =
            [(TABLE, kernel.apply(&deletion)), (STAND_IN, kernel.apply_to_stand_in(&deletion))];
        for (table, outcome) in outcomes {
            match outcome {
                Ok(_) => info!("removed table {family} {table}"),
                // It is there only if an upgrade was killed half way.
                Err(error) if is_absent(&error) && table == STAND_IN => {}
                Err(error) if is_absent(&error) => info!("there is no table {family} {table}"),
                Err(error) => {
                    error!("cannot remove table {family} {table}: {error}");
                    errors.push(error);
                }
            }
        }
    }
    if guarded && host::Sysctl::default().routes_loopback() {
        warn!(
            "net.ipv4.conf.all.route_localnet is still 1, and nothing of nftproxy keeps others from \
             loopback addresses now: set it to 0 unless something else needs it"
        );
    }
    if errors.is_empty() { Ok(()) } else { Err(CommandError::Cleanup(errors)) }
}

/// Removes what kube-proxy left, likewise.
pub fn kube_proxy() -> Result<(), CommandError> {
    match takeover::remove(Purpose::Cleanup) {
        0 => Ok(()),
        failed => Err(CommandError::KubeProxy(failed)),
    }
}

fn is_absent(error: &ApplyError) -> bool {
    matches!(error, ApplyError::Refused { refusals } if refusals.iter().all(|r| r.errno == libc::ENOENT))
}
