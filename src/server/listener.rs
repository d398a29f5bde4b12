//! One listening address: bound, and bound again after failures; and its connections.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, info, warn};

use super::{Answers, Reply};

/// How long after a failure it is tried again.
pub(super) const RETRY: Duration = Duration::from_secs(5);

/// Connections of one server at a time. One more ends the oldest: a client that sends its request at once
/// is answered, however many others do not.
const MAX_CONNECTIONS: usize = 128;

/// How long a client may take for its request, and keep an idle connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection may last at all.
const LIFETIME: Duration = Duration::from_secs(600);

/// A port cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve {what} on {address}: {source}")]
pub struct BindError {
    /// What is served there.
    pub what: &'static str,
    /// The address as configured.
    pub address: SocketAddr,
    /// The system's reason.
    pub source: io::Error,
}

/// Which packets a wildcard address takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Of both families, whichever it is written in, as Go's listeners do.
    Both,
    /// Of its own family.
    Own,
}

/// Listens at an address. To be called in a tokio runtime.
pub(super) fn bind(address: SocketAddr, scope: Scope) -> io::Result<TcpListener> {
    let socket = match (address.ip(), scope) {
        (IpAddr::V4(v4), Scope::Both) if v4.is_unspecified() => {
            let both = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), address.port());
            // A host may have no IPv6 at all.
            bound(both, false).or_else(|error| match error.raw_os_error() {
                Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => bound(address, false),
                _ => Err(error),
            })
        }
        (_, scope) => bound(address, scope == Scope::Own),
    }?;
    socket.listen(1024)?;
    TcpListener::from_std(socket.into())
}

fn bound(address: SocketAddr, only_v6: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // A restart must not wait for connections of the last run to be forgotten.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(only_v6)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Serves at an address for ever; returns only if that cannot be and `hard_fail` asks for it.
pub(super) async fn keep(
    what: &'static str,
    address: SocketAddr,
    hard_fail: bool,
    stopping: watch::Receiver<bool>,
    answers: Arc<impl Answers>,
) -> BindError {
    let mut said = None;
    loop {
        match bind(address, Scope::Both) {
            Ok(listener) => {
                info!(%address, "serving {what}");
                serve(listener, MAX_CONNECTIONS, stopping, answers).await;
                return std::future::pending().await;
            }
            Err(source) if hard_fail => return BindError { what, address, source },
            Err(error) => {
                if said.replace(error.kind()) != Some(error.kind()) {
                    let hint = match error.kind() {
                        io::ErrorKind::AddrInUse => {
                            format!(
                                ": does kube-proxy, or another nftproxy, run here? `ss -lntp 'sport = :{}'` \
                                 names the process",
                                address.port()
                            )
                        }
                        _ => String::new(),
                    };
                    warn!(%address, %error, retry_in = ?RETRY, "cannot serve {what}{hint}");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Answers connections, so many at a time, until the program stops: then it takes no more, and ends when
/// every request that has begun is answered. Aborted, it ends at once. Who comes when there are as many
/// takes the place of the one that has been there for longest.
pub(super) async fn serve(
    listener: TcpListener,
    limit: usize,
    mut stopping: watch::Receiver<bool>,
    answers: Arc<impl Answers>,
) {
    let mut connections = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    while !*stopping.borrow() {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let connection = answer(stream, stopping.clone(), answers.clone());
                    by_age.retain(|connection| !connection.is_finished());
                    if by_age.len() >= limit
                        && let Some(oldest) = by_age.pop_front()
                    {
                        oldest.abort();
                    }
                    by_age.push_back(connections.spawn(tokio::time::timeout(LIFETIME, connection)));
                }
                Err(error) => {
                    // Out of file descriptors, mostly: they are needed elsewhere, too.
                    debug!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = stopping.changed() => {}
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn answer(
    stream: TcpStream,
    mut stopping: watch::Receiver<bool>,
    answers: Arc<impl Answers>,
) {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let (answers, (request, _)) = (answers.clone(), request.into_parts());
        async move { Ok::<_, Infallible>(response(answers.answer(&request).await)) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .title_case_headers(true)
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let stop = async move { drop(stopping.wait_for(|stopping| *stopping).await) };
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        debug!(%error, "a connection ended early");
    }
}

fn response(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::builder().status(reply.code);
    for (name, value) in reply.headers {
        response = response.header(name, value);
    }
    response.body(Full::from(reply.body)).expect("codes and headers are well-formed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wildcard_takes_both_families_or_its_own() {
        let any: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let both = bind(any, Scope::Both).unwrap();
        if both.local_addr().unwrap().is_ipv6() {
            let port = both.local_addr().unwrap().port();
            TcpStream::connect(("127.0.0.1", port)).await.expect("IPv4 arrives, too");
        }
        let own = bind(any, Scope::Own).unwrap();
        assert!(own.local_addr().unwrap().is_ipv4());
        // The other family's port of that number is free.
        let same = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), own.local_addr().unwrap().port());
        match bind(same, Scope::Own) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EAFNOSUPPORT), "{error}"),
        }
        let taken = own.local_addr().unwrap();
        assert_eq!(bind(taken, Scope::Own).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
