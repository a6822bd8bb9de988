//! Admin HTTP: `/metrics`, `/healthz`, `/readyz`, `/status` and a page at `/`.
//!
//! It shows and changes nothing. Workers use the same routes for theirs: [`serve`] only needs
//! something that implements [`Admin`]. Whoever can reach the address may use it, so connections are bounded in number
//! and time.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use core::future::Future;
use core::net::SocketAddr;
use core::pin::{Pin, pin};
use core::time::Duration;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

/// The page of a shard, complete in itself.
pub const SHARD_PAGE: &str = include_str!("page.html");

/// Bounds of the admin server.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections at once; further ones wait in the kernel.
    connections: usize,
    /// From a connection's start, or its last answer, to the end of a request's head.
    head: Duration,
    /// Age at which a connection takes no further request.
    age: Duration,
}

const LIMITS: Limits = Limits {
    connections: 64,
    head: Duration::from_secs(10),
    age: Duration::from_secs(60),
};
/// Pause after the system gave no connection, for example because too many files are open.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// A future of `T` that can be sent to another thread.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a process shows about itself.
pub trait Admin: Send + Sync + 'static {
    /// Metrics in Prometheus' text format.
    fn metrics(&self) -> String;
    /// `Err` says why it cannot do its work now.
    ///
    /// # Errors
    /// The reason, for people.
    fn ready(&self) -> Answer<'_, Result<(), String>>;
    /// Status as JSON.
    fn status(&self) -> Answer<'_, String>;
    /// HTML for `/`.
    fn page(&self) -> &'static str;
}

/// Why the admin address cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for the admin pages: {source}; choose another address with --admin, or `off`"
)]
pub struct AdminBindError {
    address: SocketAddr,
    source: io::Error,
}

/// Takes the address.
///
/// # Errors
/// If it is in use or not of this machine.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, AdminBindError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| AdminBindError { address, source })
}

/// Serves until `until` is done. Connections end with it.
///
/// # Errors
/// None today: a system that gives no connection is asked again.
pub async fn serve(
    listener: TcpListener,
    admin: Arc<dyn Admin>,
    until: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    tokio::select! {
        () = serve_within(LIMITS, listener, admin) => {}
        () = until => {}
    }
    Ok(())
}

/// Serves until it is dropped.
async fn serve_within(limits: Limits, listener: TcpListener, admin: Arc<dyn Admin>) {
    let routes = routes(admin);
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                connections.spawn(connection(limits, stream, routes.clone(), place));
            }
            Err(error) => {
                tracing::warn!(%error, "no connection for the admin pages");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// One connection, which may ask again and again until it is old.
async fn connection(
    limits: Limits,
    stream: TcpStream,
    routes: Router,
    _place: OwnedSemaphorePermit,
) {
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut serving = pin!(serving);
    // An error is the peer's: it went, fell silent or speaks something else.
    tokio::select! {
        _peers_error = serving.as_mut() => return,
        () = tokio::time::sleep(limits.age) => serving.as_mut().graceful_shutdown(),
    }
    let _slow_reader = tokio::time::timeout(limits.head, serving).await;
}

fn routes(admin: Arc<dyn Admin>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .with_state(admin)
}

async fn page(State(admin): State<Arc<dyn Admin>>) -> Response {
    let mut response = typed("text/html; charset=utf-8", admin.page().to_owned());
    // Host and job names come from peers; the page sets them as text, and nothing from elsewhere may run.
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:";
    response.headers_mut().insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(policy),
    );
    response
}

async fn metrics(State(admin): State<Arc<dyn Admin>>) -> Response {
    typed("text/plain; version=0.0.4", admin.metrics())
}

async fn ready(State(admin): State<Arc<dyn Admin>>) -> Response {
    match admin.ready().await {
        Ok(()) => "ready\n".into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn status(State(admin): State<Arc<dyn Admin>>) -> Response {
    typed("application/json", admin.status().await)
}

fn typed(content_type: &'static str, body: String) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, body).into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Nothing;

    impl Admin for Nothing {
        fn metrics(&self) -> String {
            String::new()
        }
        fn ready(&self) -> Answer<'_, Result<(), String>> {
            Box::pin(async { Ok(()) })
        }
        fn status(&self) -> Answer<'_, String> {
            Box::pin(async { "null".to_owned() })
        }
        fn page(&self) -> &'static str {
            "page"
        }
    }

    /// Serves in the background.
    async fn started(limits: Limits) -> SocketAddr {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve_within(limits, listener, Arc::new(Nothing)));
        address
    }

    const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n";

    async fn dial(address: SocketAddr, says: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(says).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn a_place_is_free_again_when_half_a_request_was_given_up() {
        let limits = Limits {
            connections: 1,
            head: Duration::from_millis(100),
            ..LIMITS
        };
        let address = started(limits).await;
        let stuck = dial(address, &REQUEST[..20]).await;
        let mut second = dial(address, REQUEST).await;
        let mut answer = [0; 12];
        second.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        // There was one place: the second was served after the first had lost it. (On an open connection there would
        // be nothing to read yet.)
        let mut stuck = stuck.into_std().unwrap();
        std::io::Read::read(&mut stuck, &mut answer).unwrap();
    }

    #[tokio::test]
    async fn an_old_connection_ends_in_order() {
        let limits = Limits {
            age: Duration::from_millis(100),
            ..LIMITS
        };
        let address = started(limits).await;
        let mut stream = dial(address, REQUEST).await;
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert!(
            said.starts_with("HTTP/1.1 200") && said.ends_with("ok\n"),
            "{said}"
        );
    }
}
