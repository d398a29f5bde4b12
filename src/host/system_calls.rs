//! System calls that the process gives up, so that who takes it over by a fault in it finds less of the
//! kernel to attack.
//!
//! A list of what is refused, not of what is allowed: which calls the C library, the runtime and the kernel
//! make of one another changes with each update, and a proxy that dies of that at night is worse than one
//! that could make a call too many. For the same reason a call is refused with EPERM, as without a
//! capability, and never by ending the process. Listed is what no service proxy has a use for. What depends
//! on arguments is told from them: namespaces cannot be made, threads can; sockets of the families that are
//! used can be had, and others not.
//!
//! Refused on all threads, and in every program that is started, for good. The kernel looks at the architecture,
//! too: a call by the convention of another one ends the process, as nothing here ever makes one.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Refused whatever the arguments are.
const REFUSED: &[c_long] = &[
    // To look into, or act on behalf of, other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    // Another view of files and of the network.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_by_handle_at,
    // Code in the kernel, or another kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    // What faults of the kernel are often made use of by.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_personality,
    libc::SYS_fanotify_init,
    // The machine as a whole.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
];

/// To become another program.
const EXECUTE: [c_long; 2] = [libc::SYS_execve, libc::SYS_execveat];

/// Any of these in `clone` makes a namespace.
const NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Families of sockets that there are: of the network, to talk to the kernel, and to this host's resolver.
const SOCKETS: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// System calls cannot be given up.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// There is no list for this machine.
    #[error("no list of system calls for this architecture: {0}")]
    Compile(#[from] BackendError),
    /// The kernel does not take it.
    #[error("the kernel does not take a filter of system calls: {0}")]
    Install(#[from] Error),
}

/// Gives up system calls, for this thread and whatever it starts; programs may be started if `programs`
/// says so.
pub fn refuse_system_calls(programs: bool) -> Result<(), FilterError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    if !programs {
        rules.extend(EXECUTE.map(|call| (call, Vec::new())));
    }
    let namespaces = NAMESPACES.iter().map(|flag| {
        let flag = u64::from(flag.cast_unsigned());
        let set = SeccompCmpOp::MaskedEq(flag);
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Qword, set, flag)?])
    });
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    let other = SOCKETS.iter().map(|family| {
        let family = u64::from(family.cast_unsigned());
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
    });
    let other = SeccompRule::new(other.collect::<Result<_, _>>()?)?;
    rules.insert(libc::SYS_socket, vec![other]);
    install(rules, libc::EPERM)?;
    // Its flags are where a filter cannot look. Libraries that hear that it is unknown use `clone`.
    install([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)
}

fn install(rules: BTreeMap<c_long, Vec<SeccompRule>>, errno: i32) -> Result<(), FilterError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let refuse = SeccompAction::Errno(errno.cast_unsigned());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture)?;
    Ok(seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?)
}
