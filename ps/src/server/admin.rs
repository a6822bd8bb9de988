//! Admin HTTP: `/metrics`, `/healthz`, `/readyz`, `/status` and a page at `/`.
//!
//! It shows and changes nothing. Workers use the same routes for theirs: [`serve`] only needs
//! something that implements [`Admin`].

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use core::future::Future;
use core::net::SocketAddr;
use core::pin::Pin;
use std::io;
use std::sync::Arc;
use tokio::net::TcpListener;

/// The page of a shard, complete in itself.
pub const SHARD_PAGE: &str = include_str!("page.html");

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

/// Serves until `until` is done.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    admin: Arc<dyn Admin>,
    until: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .with_state(admin);
    axum::serve(listener, routes)
        .with_graceful_shutdown(until)
        .await
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
