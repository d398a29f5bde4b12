//! How much of the memory that it has used the process keeps for the next time: little.
//!
//! glibc raises, with every large block that is freed, the size from which on it gives blocks back to the
//! system, up to 32 MiB, and keeps twice that of what is free. A Service with Maglev tables is a block of many
//! MiB for the time of one commit; without these limits, a process whose tables take 1 MiB was seen to have
//! 54 MiB, and 14 MiB with them (`tests/soak/README.md`).

/// From this size on, blocks are given back when they are freed; and free memory at the end of the heap.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 128 << 10;

/// Heaps; otherwise there can be eight for each processor.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 2;

/// Gives free memory back to the system early. To be called before there are threads.
pub fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_MMAP_THRESHOLD, KEPT), (libc::M_TRIM_THRESHOLD, KEPT), (libc::M_ARENA_MAX, HEAPS)]
    {
        // What it refuses, it leaves as it was, which is slower to give back and no more.
        #[expect(unsafe_code, reason = "there is no safe way to the allocator's parameters")]
        // SAFETY: mallopt takes two numbers and refuses those that it does not know.
        unsafe {
            libc::mallopt(parameter, value);
        }
    }
}
