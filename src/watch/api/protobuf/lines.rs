//! An answer that is read as it comes, and handed on as lines of JSON.
//!
//! What is in the pieces that come differs: events of a watch, objects of a list. How they come, end and break
//! off does not.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll, ready};

use hyper::body::{Body as HttpBody, Bytes, Frame};
use kube::client::Body;

use super::{Error, Unreadable, give_up};

/// Reads an answer piece by piece, wherever it is cut.
pub(super) trait Read: Unpin {
    /// Takes in what came; returns what is whole by then.
    fn take(&mut self, data: &[u8]) -> Result<Vec<u8>, Unreadable>;

    /// Nothing more comes; returns the last of it.
    fn end(&mut self) -> Result<Vec<u8>, Unreadable>;
}

/// The lines of an answer.
pub(super) struct Lines<R> {
    body: Body,
    reader: R,
    /// It came to its end, or cannot be read.
    ended: bool,
    plain: Arc<AtomicBool>,
}

impl<R: Read> Lines<R> {
    pub(super) fn of(body: Body, reader: R, plain: Arc<AtomicBool>) -> Self {
        Self { body, reader, ended: false, plain }
    }
}

impl<R: Read> HttpBody for Lines<R> {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let outcome = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None => {
                    self.ended = true;
                    self.reader.end()
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Some(Ok(frame)) => {
                    let Some(data) = frame.data_ref() else { continue };
                    self.reader.take(data)
                }
            };
            return Poll::Ready(Some(match outcome {
                Ok(lines) if lines.is_empty() => continue,
                Ok(lines) => Ok(Frame::data(lines.into())),
                Err(error) => {
                    self.ended = true;
                    // Answers are cut; that is no fault of the encoding.
                    if !matches!(error, Unreadable::Torn) {
                        give_up(&self.plain, &error);
                    }
                    Err(error.into())
                }
            }));
        }
    }
}
