//! The admin port: `/metrics`, `/healthz`, `/readyz`, and a status page at `/`.
//!
//! Plain HTTP/1.1 without anything that changes state. The page is one document without scripts or outside resources;
//! every value on it is escaped.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{Html, IntoResponse},
    routing::get,
};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    serve::{self, BindError, Protocol, ServeLimits},
    telemetry::{TEXT_FORMAT, Telemetry},
};

/// Whether the service takes calls, and why not. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Mutex<Result<(), String>>>);

impl Readiness {
    /// Not ready, for `reason`.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self(Arc::new(Mutex::new(Err(reason.into()))))
    }

    /// It takes calls.
    pub fn ready(&self) {
        *self.0.lock() = Ok(());
    }

    /// It takes none, for `reason`.
    pub fn not_ready(&self, reason: impl Into<String>) {
        *self.0.lock() = Err(reason.into());
    }

    /// The reason, when it is not ready.
    pub fn state(&self) -> Result<(), String> {
        self.0.lock().clone()
    }
}

/// Status as `understudy --json status` prints it.
pub type StatusFn = Arc<dyn Fn() -> Value + Send + Sync>;

#[derive(Clone)]
struct Admin {
    telemetry: Telemetry,
    readiness: Readiness,
    status: StatusFn,
    /// Refreshes gauges that are read, not counted.
    refresh: Arc<dyn Fn() + Send + Sync>,
}

/// The routes of the admin port. `refresh` runs before metrics are collected; `status` is called for each page.
pub fn router(
    telemetry: Telemetry,
    readiness: Readiness,
    status: StatusFn,
    refresh: impl Fn() + Send + Sync + 'static,
) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/", get(page))
        .with_state(Admin { telemetry, readiness, status, refresh: Arc::new(refresh) })
}

/// An admin port that is served.
#[derive(Debug)]
pub struct AdminPort {
    /// Where, with the real port.
    pub address: SocketAddr,
    source: Arc<OnceLock<Source>>,
    stop: CancellationToken,
    task: JoinHandle<usize>,
}

struct Source {
    status: StatusFn,
    refresh: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Source")
    }
}

impl AdminPort {
    /// Opens and serves it. The status page is empty until [`AdminPort::show`]: recovery goes on behind it.
    pub async fn open(address: SocketAddr, telemetry: Telemetry, readiness: Readiness) -> Result<Self, BindError> {
        let listener = serve::bind(address).await?;
        let address = listener.local_addr().map_err(|source| BindError { address, source })?;
        let source = Arc::new(OnceLock::<Source>::new());
        let (for_status, for_refresh) = (source.clone(), source.clone());
        let status: StatusFn = Arc::new(move || for_status.get().map_or_else(|| json!({}), |source| (source.status)()));
        let refresh = move || {
            if let Some(source) = for_refresh.get() {
                (source.refresh)();
            }
        };
        let router = router(telemetry, readiness, status, refresh);
        let stop = CancellationToken::new();
        let limits = ServeLimits { drain: std::time::Duration::from_millis(200), ..ServeLimits::default() };
        let task = tokio::spawn(serve::serve(listener, Protocol::Http1, None, limits, router, stop.clone()));
        Ok(Self { address, source, stop, task })
    }

    /// From now on the page shows `status`, and `refresh` runs before metrics are collected. Once only.
    pub fn show(&self, status: StatusFn, refresh: impl Fn() + Send + Sync + 'static) {
        let source = Source { status, refresh: Box::new(refresh) };
        assert!(self.source.set(source).is_ok(), "the service starts once");
    }

    /// Stops serving.
    pub async fn close(self) {
        self.stop.cancel();
        // An error would be its panic, which the process has ended with.
        let _ = self.task.await;
    }
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    (admin.refresh)();
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], admin.telemetry.encode())
}

async fn ready(State(admin): State<Admin>) -> impl IntoResponse {
    match admin.readiness.state() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn page(State(admin): State<Admin>) -> impl IntoResponse {
    let headers = [
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, Html(render(&(admin.status)(), &admin.readiness.state())))
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}\
    table{border-collapse:collapse;margin:0 0 1.5rem}th,td{border-bottom:1px solid #8884;padding:.3rem .8rem;\
    text-align:left;vertical-align:top}th{font-weight:600}h1{font-size:1.4rem}h2{font-size:1.1rem}\
    @media(prefers-color-scheme:dark){body{background:#111;color:#ddd}}";

/// The page of a status: scalars first, then a table for each object, and one for the volumes.
fn render(status: &Value, ready: &Result<(), String>) -> String {
    let role = status.get("role").and_then(Value::as_str).unwrap_or("service");
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><meta http-equiv=\"refresh\" content=\"5\">\
         <title>understudy {0}</title><style>{STYLE}</style></head><body><h1>understudy {0}</h1>",
        escape(role)
    );
    let state = match ready {
        Ok(()) => "ready".to_owned(),
        Err(reason) => format!("not ready: {reason}"),
    };
    let mut facts = vec![("state".to_owned(), state)];
    let mut sections = Vec::new();
    for (name, value) in status.as_object().into_iter().flatten() {
        match value {
            Value::Object(_) => sections.push((name, value)),
            Value::Array(_) => {}
            value => facts.push((name.clone(), plain(value))),
        }
    }
    facts_table(&mut page, &facts);
    for (name, section) in sections {
        let _ = write!(page, "<h2>{}</h2>", escape(name));
        facts_table(&mut page, &flat(section));
    }
    if let Some(volumes) = status.get("volumes").and_then(Value::as_array) {
        let _ = write!(page, "<h2>volumes</h2>");
        rows_table(&mut page, volumes);
    }
    page.push_str("<p><a href=\"/metrics\">metrics</a> <a href=\"/readyz\">readiness</a></p></body></html>");
    page
}

fn facts_table(page: &mut String, facts: &[(String, String)]) {
    page.push_str("<table>");
    for (name, value) in facts {
        let _ = write!(page, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(name), escape(value));
    }
    page.push_str("</table>");
}

/// One row for each object; the columns are the names of all of them, in order of appearance.
fn rows_table(page: &mut String, rows: &[Value]) {
    if rows.is_empty() {
        page.push_str("<p>none</p>");
        return;
    }
    let rows: Vec<Vec<(String, String)>> = rows.iter().map(flat).collect();
    let mut columns: Vec<&str> = Vec::new();
    for (name, _) in rows.iter().flatten() {
        if !columns.contains(&name.as_str()) {
            columns.push(name);
        }
    }
    page.push_str("<table><thead><tr>");
    for column in &columns {
        let _ = write!(page, "<th scope=\"col\">{}</th>", escape(column));
    }
    page.push_str("</tr></thead><tbody>");
    for row in &rows {
        page.push_str("<tr>");
        for column in &columns {
            let value = row.iter().find(|(name, _)| name == column).map_or("", |(_, value)| value);
            let _ = write!(page, "<td>{}</td>", escape(value));
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table>");
}

/// Names and values of an object; those of inner objects as `outer.inner`.
fn flat(value: &Value) -> Vec<(String, String)> {
    let mut flattened = Vec::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        if value.is_object() {
            flattened.extend(flat(value).into_iter().map(|(inner, text)| (format!("{name}.{inner}"), text)));
        } else {
            flattened.push((name.clone(), plain(value)));
        }
    }
    flattened
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        value => value.to_string(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use http_body_util::BodyExt;
    use serde_json::json;
    use tower::ServiceExt;

    use super::*;

    async fn get(router: &Router, path: &str) -> (StatusCode, String) {
        let response = router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn each_path_says_what_it_should() {
        let telemetry = Telemetry::new("primary");
        let gauge = telemetry.int_gauge("refreshed", "Test.");
        let readiness = Readiness::new("starting");
        let status = json!({
            "role": "primary", "generation": 3, "link": {"state": "attached", "reason": null},
            "volumes": [{"name": "<db>", "position": {"next": {"lsn": 9}}}, {"name": "b", "cause": "none"}],
        });
        let status: StatusFn = Arc::new(move || status.clone());
        let router = router(telemetry, readiness.clone(), status, move || gauge.set(7));

        assert_eq!(get(&router, "/healthz").await, (StatusCode::OK, "ok\n".into()));
        assert_eq!(get(&router, "/readyz").await, (StatusCode::SERVICE_UNAVAILABLE, "starting\n".into()));
        readiness.ready();
        assert_eq!(get(&router, "/readyz").await, (StatusCode::OK, "ready\n".into()));
        assert!(get(&router, "/metrics").await.1.contains("\nunderstudy_refreshed 7\n"));
        assert_eq!(get(&router, "/nothing").await.0, StatusCode::NOT_FOUND);

        let (_, page) = get(&router, "/").await;
        for part in
            ["understudy primary", "&lt;db&gt;", "<th scope=\"col\">position.next.lsn</th>", "attached", "<td>9</td>"]
        {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        assert!(!page.contains("<db>"), "{page}");
    }
}
