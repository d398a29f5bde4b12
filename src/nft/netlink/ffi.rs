//! libnftnl's objects as owned Rust values.
//!
//! nftnl's safe types have no maps, no verdict or data elements, no userdata and no dumps, so these
//! are wrapped here, one small method for each library call. An attribute number is only ever one of
//! libnftnl's constants, and data is copied by the library, which is what makes the calls sound.

#![expect(unsafe_code, reason = "this module is the boundary to libnftnl")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

use nftnl::nftnl_sys as sys;

use crate::nlmsg::{GENMSG, HEADER, number};

/// An allocation of libnftnl failed: it is a few bytes, so the system is at its end.
fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}

/// A name that goes to the kernel. Ours are made of letters, digits and dashes.
pub(super) fn c_string(text: &str) -> CString {
    CString::new(text).expect("names of the program hold no NUL")
}

fn attr(attribute: u32) -> u16 {
    u16::try_from(attribute).expect("libnftnl's attributes are small numbers")
}

/// A received message as libnftnl takes it, if it is as long as its header says. Messages start at
/// multiples of four in a receive buffer that is aligned for more.
#[expect(clippy::cast_ptr_alignment, reason = "it is looked at")]
fn header_of(message: &[u8]) -> Option<*const libc::nlmsghdr> {
    let length = u32::from_ne_bytes(number(message, 0)?) as usize;
    let header = message.as_ptr().cast::<libc::nlmsghdr>();
    let whole = (HEADER + GENMSG..=message.len()).contains(&length) && header.is_aligned();
    whole.then_some(header)
}

/// Room for the largest message there is.
pub(super) struct Room(*mut c_char);

impl Room {
    /// The room at this place.
    ///
    /// # Safety
    /// As many bytes as the largest message has must be there to be written, for as long as this lives.
    pub(super) unsafe fn at(place: *mut c_char) -> Self {
        Self(place)
    }

    /// Its first byte, for a message that somebody else writes.
    pub(super) fn place(&mut self) -> *mut c_char {
        self.0
    }

    /// Writes the message that begins a batch.
    pub(super) fn begin_batch(&mut self, sequence: u32) {
        // SAFETY: there is room for the largest message.
        let _ = unsafe { sys::nftnl_batch_begin(self.0, sequence) };
    }

    /// Writes the message that ends it.
    pub(super) fn end_batch(&mut self, sequence: u32) {
        // SAFETY: there is room for the largest message.
        let _ = unsafe { sys::nftnl_batch_end(self.0, sequence) };
    }

    /// Writes the header of a message.
    pub(super) fn header(
        &mut self,
        kind: libc::c_int,
        family: u16,
        flags: libc::c_int,
        sequence: u32,
    ) -> Header<'_> {
        let kind = u16::try_from(kind).expect("message types are small numbers");
        let flags = u16::try_from(flags).expect("flags are 16 bits");
        // SAFETY: there is room for the largest message.
        let header = unsafe { sys::nftnl_nlmsg_build_hdr(self.0, kind, family, flags, sequence) };
        Header(header, PhantomData)
    }
}

/// The header of a message that stands in a [`Room`], its payload still to come.
pub(super) struct Header<'a>(*mut libc::nlmsghdr, PhantomData<&'a mut Room>);

fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("attributes are short")
}

/// Reads a string attribute: owned by the object, NUL-terminated, or null.
///
/// # Safety
/// `text` must be null or point to a NUL-terminated string that lives while it is read.
unsafe fn string(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller's promise.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Reads a data attribute, likewise.
///
/// # Safety
/// `data` must be null or point to `len` bytes that live while they are read.
unsafe fn bytes(data: *const c_void, len: u32) -> Option<Vec<u8>> {
    if data.is_null() {
        return None;
    }
    // SAFETY: not null, and the caller's promise.
    Some(unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len as usize) }.to_vec())
}

/// Declares the owned form of one of libnftnl's objects.
macro_rules! object {
    (
        $(#[$doc:meta])*
        $name:ident($raw:ident): $alloc:ident, $free:ident
        $(, parse $parse:ident)? $(, build $build:ident)?
        $(, set_u32 $set_u32:ident)? $(, set_str $set_str:ident)? $(, set_data $set_data:ident)?
        $(, get_u32 $get_u32:ident)? $(, get_str $get_str:ident)?
        $(, get_data $get_data:ident, is_set $is_set:ident)?
    ) => {
        $(#[$doc])*
        pub(super) struct $name(NonNull<sys::$raw>);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: allocated by libnftnl, owned by this value, freed once.
                unsafe { sys::$free(self.0.as_ptr()) };
            }
        }

        impl $name {
            pub(super) fn new() -> Self {
                // SAFETY: takes nothing; null is handled.
                Self(allocated(unsafe { sys::$alloc() }))
            }

            $(
                /// Reads the object out of a netlink message, which must be complete.
                pub(super) fn parse(message: &[u8]) -> Option<Self> {
                    let header = header_of(message)?;
                    let this = Self::new();
                    // SAFETY: the message is as long as its header says.
                    let outcome = unsafe { sys::$parse(header, this.0.as_ptr()) };
                    (outcome >= 0).then_some(this)
                }
            )?
            $(
                /// Writes the object behind a message's header.
                pub(super) fn build(&mut self, header: Header<'_>) {
                    // SAFETY: the object is live; behind the header there is room for the largest.
                    unsafe { sys::$build(header.0, self.0.as_ptr()) };
                }
            )?
            $(
                pub(super) fn set_u32(&mut self, attribute: u32, value: u32) {
                    // SAFETY: the object is live, the attribute a constant of its kind.
                    unsafe { sys::$set_u32(self.0.as_ptr(), attr(attribute), value) };
                }
            )?
            $(
                pub(super) fn set_str(&mut self, attribute: u32, value: &str) {
                    let value = c_string(value);
                    // SAFETY: as above; the library copies the string.
                    unsafe { sys::$set_str(self.0.as_ptr(), attr(attribute), value.as_ptr()) };
                }
            )?
            $(
                pub(super) fn set_data(&mut self, attribute: u32, value: &[u8]) {
                    let data = value.as_ptr().cast::<c_void>();
                    // SAFETY: as above; the library copies the data.
                    unsafe {
                        sys::$set_data(self.0.as_ptr(), attr(attribute), data, length(value))
                    };
                }
            )?
            $(
                pub(super) fn get_u32(&self, attribute: u32) -> u32 {
                    // SAFETY: as above; an unset attribute reads as 0.
                    unsafe { sys::$get_u32(self.0.as_ptr(), attr(attribute)) }
                }
            )?
            $(
                pub(super) fn get_str(&self, attribute: u32) -> Option<String> {
                    // SAFETY: as above.
                    let text = unsafe { sys::$get_str(self.0.as_ptr(), attr(attribute)) };
                    // SAFETY: the string is owned by the object.
                    unsafe { string(text) }
                }
            )?
            $(
                pub(super) fn get_data(&self, attribute: u32) -> Option<Vec<u8>> {
                    // SAFETY: as above.
                    if !unsafe { sys::$is_set(self.0.as_ptr(), attr(attribute)) } {
                        return None;
                    }
                    let mut len = 0;
                    let raw = self.0.as_ptr();
                    // SAFETY: as above; the data's length is written to `len`.
                    let data = unsafe { sys::$get_data(raw, attr(attribute), &raw mut len) };
                    // SAFETY: `len` bytes, owned by the object.
                    unsafe { bytes(data, len) }
                }
            )?
        }
    };
}

object! {
    /// `struct nftnl_table`
    Table(nftnl_table): nftnl_table_alloc, nftnl_table_free,
    parse nftnl_table_nlmsg_parse, build nftnl_table_nlmsg_build_payload,
    set_u32 nftnl_table_set_u32, set_str nftnl_table_set_str, set_data nftnl_table_set_data,
    get_u32 nftnl_table_get_u32, get_str nftnl_table_get_str, get_data nftnl_table_get_data, is_set nftnl_table_is_set
}

object! {
    /// `struct nftnl_chain`
    Chain(nftnl_chain): nftnl_chain_alloc, nftnl_chain_free,
    parse nftnl_chain_nlmsg_parse,
    get_u32 nftnl_chain_get_u32, get_str nftnl_chain_get_str
}

object! {
    /// `struct nftnl_set`
    Set(nftnl_set): nftnl_set_alloc, nftnl_set_free,
    parse nftnl_set_nlmsg_parse, build nftnl_set_nlmsg_build_payload,
    set_u32 nftnl_set_set_u32, set_str nftnl_set_set_str, set_data nftnl_set_set_data,
    get_u32 nftnl_set_get_u32, get_str nftnl_set_get_str
}

object! {
    /// `struct nftnl_rule`
    Rule(nftnl_rule): nftnl_rule_alloc, nftnl_rule_free,
    parse nftnl_rule_nlmsg_parse, build nftnl_rule_nlmsg_build_payload,
    set_str nftnl_rule_set_str,
    get_str nftnl_rule_get_str, get_data nftnl_rule_get_data, is_set nftnl_rule_is_set
}

object! {
    /// `struct nftnl_gen`
    Generation(nftnl_gen): nftnl_gen_alloc, nftnl_gen_free,
    parse nftnl_gen_nlmsg_parse,
    get_u32 nftnl_gen_get_u32
}

impl Chain {
    /// Hook priority, the one signed attribute.
    pub(super) fn priority(&self) -> i32 {
        // SAFETY: the object is live, the attribute a constant of its kind.
        unsafe { sys::nftnl_chain_get_s32(self.0.as_ptr(), attr(sys::NFTNL_CHAIN_PRIO)) }
    }
}

impl Set {
    /// Writes the elements behind a message's header.
    #[expect(clippy::needless_pass_by_value, reason = "a header has one payload")]
    pub(super) fn build_elements(&mut self, header: Header<'_>) {
        // SAFETY: the object is live; behind the header there is room for the largest.
        unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header.0, self.0.as_ptr()) };
    }

    /// Reads the elements of a message and hands each on.
    pub(super) fn parse_elements(message: &[u8], mut each: impl FnMut(ElementRef<'_>)) -> bool {
        let Some(header) = header_of(message) else { return false };
        let this = Self::new();
        // SAFETY: the message is as long as its header says.
        if unsafe { sys::nftnl_set_elems_nlmsg_parse(header, this.0.as_ptr()) } < 0 {
            return false;
        }
        // SAFETY: the set is live as long as the iterator.
        let iterator = allocated(unsafe { sys::nftnl_set_elems_iter_create(this.0.as_ptr()) });
        loop {
            // SAFETY: the iterator is live.
            let element = unsafe { sys::nftnl_set_elems_iter_next(iterator.as_ptr()) };
            let Some(element) = NonNull::new(element) else { break };
            each(ElementRef(element, PhantomData));
        }
        // SAFETY: created above, destroyed once.
        unsafe { sys::nftnl_set_elems_iter_destroy(iterator.as_ptr()) };
        true
    }
}

impl Rule {
    /// What the rule does, an instruction a line, in libnftnl's notation.
    pub(super) fn instructions(&self) -> Vec<String> {
        let mut lines = Vec::new();
        // SAFETY: the rule is live as long as the iterator.
        let iterator = allocated(unsafe { sys::nftnl_expr_iter_create(self.0.as_ptr()) });
        loop {
            // SAFETY: the iterator is live.
            let expression = unsafe { sys::nftnl_expr_iter_next(iterator.as_ptr()) };
            let Some(expression) = NonNull::new(expression) else { break };
            lines.push(expression_text(expression));
        }
        // SAFETY: created above, destroyed once.
        unsafe { sys::nftnl_expr_iter_destroy(iterator.as_ptr()) };
        lines
    }
}

/// An expression in libnftnl's notation, for instance
/// `lookup reg 1 set services dreg 0 0x0`.
pub(super) fn expression_text(expression: NonNull<sys::nftnl_expr>) -> String {
    let mut buffer = [0_u8; 512];
    // SAFETY: the expression is live, and the length is that of the buffer, which the call ends
    // with a NUL.
    unsafe {
        sys::nftnl_expr_snprintf(
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            expression.as_ptr(),
            0, // NFTNL_OUTPUT_DEFAULT
            0,
        )
    };
    let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
    text.to_string_lossy().trim().to_owned()
}

/// An element of a dump.
pub(super) struct ElementRef<'a>(
    NonNull<sys::nftnl_set_elem>,
    PhantomData<&'a sys::nftnl_set_elem>,
);

impl ElementRef<'_> {
    fn is_set(&self, attribute: u32) -> bool {
        // SAFETY: the element lives as long as the set it was parsed into.
        unsafe { sys::nftnl_set_elem_is_set(self.0.as_ptr(), attr(attribute)) }
    }

    pub(super) fn get_u32(&self, attribute: u32) -> Option<u32> {
        // SAFETY: as above.
        self.is_set(attribute)
            .then(|| unsafe { sys::nftnl_set_elem_get_u32(self.0.as_ptr(), attr(attribute)) })
    }

    pub(super) fn get_str(&self, attribute: u32) -> Option<String> {
        if !self.is_set(attribute) {
            return None;
        }
        // SAFETY: as above.
        let text = unsafe { sys::nftnl_set_elem_get_str(self.0.as_ptr(), attr(attribute)) };
        // SAFETY: the string is owned by the element.
        unsafe { string(text) }
    }

    /// The data, if it is no longer than `N`.
    pub(super) fn get_data<const N: usize>(&self, attribute: u32) -> Option<([u8; N], usize)> {
        if !self.is_set(attribute) {
            return None;
        }
        let mut len = 0;
        // SAFETY: as above; the data is owned by the element, its length written to `len`.
        let data =
            unsafe { sys::nftnl_set_elem_get(self.0.as_ptr(), attr(attribute), &raw mut len) };
        let len = len as usize;
        if data.is_null() || len > N {
            return None;
        }
        let mut copy = [0; N];
        // SAFETY: `data` points to `len` bytes, and `len` is within `copy`.
        copy[..len].copy_from_slice(unsafe { std::slice::from_raw_parts(data.cast(), len) });
        Some((copy, len))
    }
}

/// The type-length-value lists that nft keeps its own notes in.
pub(super) struct Userdata(NonNull<sys::nftnl_udata_buf>);

impl Drop for Userdata {
    fn drop(&mut self) {
        // SAFETY: allocated by libnftnl, owned by this value, freed once.
        unsafe { sys::nftnl_udata_buf_free(self.0.as_ptr()) };
    }
}

impl Userdata {
    pub(super) fn new() -> Self {
        // SAFETY: 256 is the most the kernel takes (NFT_USERDATA_MAXLEN).
        Self(allocated(unsafe { sys::nftnl_udata_buf_alloc(256) }))
    }

    pub(super) fn put_u32(&mut self, kind: u8, value: u32) {
        // SAFETY: the buffer is live; a value that does not fit is refused by the library.
        let fits = unsafe { sys::nftnl_udata_put_u32(self.0.as_ptr(), kind, value) };
        assert!(fits, "userdata is at most 256 bytes");
    }

    pub(super) fn put_str(&mut self, kind: u8, value: &str) {
        let value = c_string(value);
        // SAFETY: as above; the library copies the string.
        let fits = unsafe { sys::nftnl_udata_put_strz(self.0.as_ptr(), kind, value.as_ptr()) };
        assert!(fits, "userdata is at most 256 bytes");
    }

    /// A nested list.
    pub(super) fn nest(&mut self, kind: u8, fill: impl FnOnce(&mut Self)) {
        // SAFETY: the buffer is live, and the nest is ended before anything else.
        let nest = allocated(unsafe { sys::nftnl_udata_nest_start(self.0.as_ptr(), kind) });
        fill(self);
        // SAFETY: started above in the same buffer, which does not move.
        unsafe { sys::nftnl_udata_nest_end(self.0.as_ptr(), nest.as_ptr()) };
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        // SAFETY: the buffer is live.
        let data = unsafe { sys::nftnl_udata_buf_data(self.0.as_ptr()) };
        // SAFETY: as above.
        let len = unsafe { sys::nftnl_udata_buf_len(self.0.as_ptr()) };
        // SAFETY: `len` bytes, owned by the buffer.
        unsafe { bytes(data, len) }.unwrap_or_default()
    }
}
