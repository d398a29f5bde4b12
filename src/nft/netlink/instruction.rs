//! An instruction of the kernel's register machine, and libnftnl's form of it.
//!
//! A dumped rule is compared with a wanted one by the text that libnftnl gives both. Which instructions a
//! rule is made of says [`lower`](super::lower).

use std::ffi::CString;
use std::ptr::NonNull;

use nftnl::expr::Expression;
use nftnl::nftnl_sys as sys;

use super::ffi::{c_string, expression_text};

/// One instruction: libnftnl's name for it, and its attributes.
pub(super) struct Instruction {
    name: &'static std::ffi::CStr,
    attributes: Vec<(u32, Value)>,
}

enum Value {
    Number(u32),
    Long(u64),
    Byte(u8),
    Data(Vec<u8>),
    Text(CString),
    /// An instruction that this one runs.
    Inner(Box<Instruction>),
}

impl Instruction {
    pub(super) fn new(name: &'static std::ffi::CStr) -> Self {
        Self { name, attributes: Vec::new() }
    }

    pub(super) fn number(mut self, attribute: u32, value: u32) -> Self {
        self.attributes.push((attribute, Value::Number(value)));
        self
    }

    pub(super) fn long(mut self, attribute: u32, value: u64) -> Self {
        self.attributes.push((attribute, Value::Long(value)));
        self
    }

    pub(super) fn constant(self, attribute: u32, value: libc::c_int) -> Self {
        self.number(attribute, value.cast_unsigned())
    }

    pub(super) fn data(mut self, attribute: u32, value: &[u8]) -> Self {
        self.attributes.push((attribute, Value::Data(value.to_vec())));
        self
    }

    pub(super) fn text(mut self, attribute: u32, value: &str) -> Self {
        self.attributes.push((attribute, Value::Text(c_string(value))));
        self
    }

    pub(super) fn byte(mut self, attribute: u32, value: libc::c_int) -> Self {
        let value = u8::try_from(value).expect("a code is one byte");
        self.attributes.push((attribute, Value::Byte(value)));
        self
    }

    pub(super) fn inner(mut self, attribute: u32, instruction: Self) -> Self {
        self.attributes.push((attribute, Value::Inner(Box::new(instruction))));
        self
    }

    /// The instruction in libnftnl's notation.
    pub(super) fn text_form(&self) -> String {
        let expression = self.allocate();
        let text = expression_text(expression);
        #[expect(unsafe_code, reason = "the expression was not given to a rule")]
        // SAFETY: allocated by `allocate`, owned here, freed once.
        unsafe {
            sys::nftnl_expr_free(expression.as_ptr());
        }
        text
    }

    #[expect(unsafe_code, reason = "expressions exist in libnftnl only")]
    fn allocate(&self) -> NonNull<sys::nftnl_expr> {
        // SAFETY: the name is NUL-terminated; null is handled.
        let expression = unsafe { sys::nftnl_expr_alloc(self.name.as_ptr()) };
        let expression = NonNull::new(expression).unwrap_or_else(|| std::process::abort());
        let raw = expression.as_ptr();
        for (attribute, value) in &self.attributes {
            let attribute = u16::try_from(*attribute).expect("attributes are small numbers");
            match value {
                // SAFETY: the expression is live, the attribute a constant of its kind.
                Value::Number(number) => unsafe {
                    sys::nftnl_expr_set_u32(raw, attribute, *number);
                },
                // SAFETY: as above.
                Value::Long(number) => unsafe {
                    sys::nftnl_expr_set_u64(raw, attribute, *number);
                },
                // SAFETY: as above.
                Value::Byte(byte) => unsafe { sys::nftnl_expr_set_u8(raw, attribute, *byte) },
                Value::Data(data) => {
                    let len = u32::try_from(data.len()).expect("operands are short");
                    // SAFETY: as above; the library copies the data.
                    unsafe { sys::nftnl_expr_set(raw, attribute, data.as_ptr().cast(), len) };
                }
                Value::Text(text) => {
                    // SAFETY: as above; the library copies the string.
                    unsafe { sys::nftnl_expr_set_str(raw, attribute, text.as_ptr()) };
                }
                Value::Inner(instruction) => {
                    let inner = instruction.allocate().as_ptr().cast();
                    // SAFETY: as above; the library takes the inner expression over, and frees it
                    // with the outer one.
                    unsafe { sys::nftnl_expr_set(raw, attribute, inner, 0) };
                }
            }
        }
        expression
    }
}

impl Expression for Instruction {
    fn to_expr(&self, _rule: &nftnl::Rule<'_>) -> NonNull<sys::nftnl_expr> {
        self.allocate()
    }
}
