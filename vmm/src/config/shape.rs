//! Compares a TOML tree with a type's JSON Schema, so that every unknown key and wrong value is found at
//! once and the schema that editors complete from is the one that the file is held against.

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::Value as Json;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::toml_file::{Checker, KeyPath, nearest};
use crate::units::{Bytes, Span};

/// Finds everything in `tree` that `T`'s schema does not allow.
pub(super) fn check<T: JsonSchema>(tree: &Spanned<DeTable<'_>>, checker: &mut Checker<'_>) {
    let root = Json::from(SchemaGenerator::default().into_root_schema_for::<T>());
    let shape = Shape { root: &root };
    let mut found = Vec::new();
    shape.table(tree.get_ref(), tree.span().start, &root, &KeyPath::root(), &mut found);
    for (offset, key, what) in found {
        checker.note(offset, &key, &what);
    }
}

type Found = Vec<(usize, KeyPath, String)>;

struct Shape<'s> {
    root: &'s Json,
}

impl<'s> Shape<'s> {
    /// Follows `$ref`s.
    fn resolve(&self, mut schema: &'s Json) -> &'s Json {
        while let Some(name) = schema.get("$ref").and_then(Json::as_str) {
            let Some(target) = name.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer)) else {
                break;
            };
            schema = target;
        }
        schema
    }

    fn value(
        &self,
        value: &Spanned<DeValue<'_>>,
        at: usize,
        schema: &'s Json,
        path: &KeyPath,
        found: &mut Found,
    ) {
        let schema = self.resolve(schema);
        for choice in ["oneOf", "anyOf"] {
            if let Some(branches) = schema.get(choice).and_then(Json::as_array) {
                self.choice(value, at, branches, path, found);
                return;
            }
        }
        if !type_fits(schema, value.get_ref()) {
            found.push((
                at,
                path.clone(),
                format!("must be {}, not {}", expected(schema), of(value.get_ref())),
            ));
            return;
        }
        match value.get_ref() {
            DeValue::Table(table) => self.table(table, at, schema, path, found),
            DeValue::Array(array) => {
                let Some(items) = schema.get("items") else { return };
                for (index, item) in array.iter().enumerate() {
                    self.value(item, item.span().start, items, &path.index(index), found);
                }
            }
            DeValue::String(text) => {
                if let Some(what) = text_mistake(schema, text) {
                    found.push((at, path.clone(), what));
                }
            }
            DeValue::Integer(_) => {
                if let Some(what) = integer_mistake(schema, value.get_ref()) {
                    found.push((at, path.clone(), what));
                }
            }
            _ => {}
        }
    }

    fn table(&self, table: &DeTable<'_>, at: usize, schema: &'s Json, path: &KeyPath, found: &mut Found) {
        let schema = self.resolve(schema);
        let properties = schema.get("properties").and_then(Json::as_object);
        let others = schema.get("additionalProperties");
        for (name, value) in table {
            let inner = path.key(name.get_ref());
            let known = properties.and_then(|properties| properties.get(name.get_ref().as_ref()));
            if let Some(known) = known {
                self.value(value, name.span().start, known, &inner, found);
            } else if others == Some(&Json::Bool(false)) {
                let names: Vec<&str> =
                    properties.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                found.push((name.span().start, inner, unknown("unknown key", name.get_ref(), &names)));
            } else if let Some(others) = others.filter(|others| others.is_object()) {
                self.value(value, name.span().start, others, &inner, found);
            }
        }
        let required = schema.get("required").and_then(Json::as_array).into_iter().flatten();
        for name in required.filter_map(Json::as_str).filter(|name| !table.contains_key(*name)) {
            found.push((at, path.key(name), "is missing".to_owned()));
        }
    }

    /// One of several shapes: an option, or an enum.
    fn choice(
        &self,
        value: &Spanned<DeValue<'_>>,
        at: usize,
        branches: &'s [Json],
        path: &KeyPath,
        found: &mut Found,
    ) {
        let mut closest: Option<Found> = None;
        for branch in branches {
            let branch = self.resolve(branch);
            let mut mistakes = Vec::new();
            self.value(value, at, branch, path, &mut mistakes);
            if mistakes.is_empty() {
                return;
            }
            let enters = branch.get("const").is_none() && type_fits(branch, value.get_ref());
            if enters && closest.as_ref().is_none_or(|closest| mistakes.len() < closest.len()) {
                closest = Some(mistakes);
            }
        }
        // Text where names are expected is one of them misspelt; the names include those of tables.
        let names: Vec<&str> = branches.iter().flat_map(|branch| names(self.resolve(branch))).collect();
        match (value.get_ref(), closest) {
            (DeValue::String(text), None) if !names.is_empty() => {
                found.push((at, path.clone(), unknown("unknown value", text, &names)));
            }
            (_, Some(closest)) => found.extend(closest),
            (other, None) => {
                let all = branches.iter().map(|branch| self.resolve(branch));
                let mut all: Vec<String> = all.filter(|branch| !is_null(branch)).map(expected).collect();
                all.dedup();
                found.push((at, path.clone(), format!("must be {}, not {}", all.join(" or "), of(other))));
            }
        }
    }
}

/// The words that a branch of an enum is chosen by.
fn names(branch: &Json) -> Vec<&str> {
    if let Some(name) = branch.get("const").and_then(Json::as_str) {
        return vec![name];
    }
    branch.get("enum").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str).collect()
}

fn unknown(what: &str, written: &str, names: &[&str]) -> String {
    match nearest(written, names.iter().copied()) {
        Some(name) => format!("{what}; did you mean `{name}`?"),
        None if names.is_empty() => what.to_owned(),
        None => format!("{what}; valid are {}", quoted(names)),
    }
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn is_null(schema: &Json) -> bool {
    schema.get("type").and_then(Json::as_str) == Some("null")
}

fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

fn type_fits(schema: &Json, value: &DeValue<'_>) -> bool {
    let types = types(schema);
    let name = match value {
        DeValue::String(_) | DeValue::Datetime(_) => "string",
        DeValue::Integer(_) => "integer",
        DeValue::Float(_) => "number",
        DeValue::Boolean(_) => "boolean",
        DeValue::Array(_) => "array",
        DeValue::Table(_) => "object",
    };
    types.is_empty() || types.contains(&name) || (name == "integer" && types.contains(&"number"))
}

/// What a schema asks for, as people say it.
fn expected(schema: &Json) -> String {
    let name = types(schema).into_iter().find(|name| *name != "null").unwrap_or("another value");
    match (name, schema.get("format").and_then(Json::as_str)) {
        ("string", Some("size")) => "a size in quotes, as \"512M\"".to_owned(),
        ("string", Some("time")) => "a time in quotes, as \"50ms\"".to_owned(),
        ("string", _) => match names(schema).as_slice() {
            [] => "a text in quotes".to_owned(),
            names => quoted(names),
        },
        ("integer", _) => "a whole number".to_owned(),
        ("number", _) => "a number".to_owned(),
        ("boolean", _) => "true or false".to_owned(),
        ("array", _) => "a list".to_owned(),
        ("object", _) => "a table".to_owned(),
        (other, _) => other.to_owned(),
    }
}

fn of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn text_mistake(schema: &Json, text: &str) -> Option<String> {
    let names = names(schema);
    if !names.is_empty() {
        return (!names.contains(&text)).then(|| unknown("unknown value", text, &names));
    }
    match schema.get("format").and_then(Json::as_str) {
        Some("size") => text.parse::<Bytes>().err(),
        Some("time") => text.parse::<Span>().err(),
        _ => None,
    }
}

fn integer_mistake(schema: &Json, value: &DeValue<'_>) -> Option<String> {
    let written = value.as_integer()?;
    let digits = written.as_str().replace('_', "");
    let number = i128::from_str_radix(&digits, written.radix()).ok()?;
    let limit = |name: &str| schema.get(name).and_then(Json::as_number).and_then(serde_json::Number::as_i128);
    match (limit("minimum"), limit("maximum")) {
        (Some(low), Some(high)) if number < low || number > high => {
            Some(format!("must be from {low} to {high}, not {number}"))
        }
        (Some(low), None) if number < low => Some(format!("must be at least {low}, not {number}")),
        (None, Some(high)) if number > high => Some(format!("must be at most {high}, not {number}")),
        _ => None,
    }
}
