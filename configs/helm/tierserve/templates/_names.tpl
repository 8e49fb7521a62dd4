{{/* The name of everything: the release's, with the chart's where that isn't in it. */}}
{{- define "tierserve.name" -}}
{{- if contains "tierserve" .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-tierserve" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{/* What finds the servers of this release. */}}
{{- define "tierserve.selector" -}}
app.kubernetes.io/name: tierserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tierserve.labels" -}}
{{ include "tierserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "tierserve.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "tierserve.scheme" -}}
{{ if .Values.config.server.tls }}https{{ else }}http{{ end }}
{{- end -}}

{{/* The bytes of a size such as 20Gi, 4GiB, 1.5 TB or 1000. */}}
{{- define "tierserve.bytes" -}}
{{- $size := toString . | lower | nospace | trimSuffix "b" -}}
{{- $units := dict "k" 1e3 "m" 1e6 "g" 1e9 "t" 1e12 "ki" 1024.0 "mi" 1048576.0 "gi" 1073741824.0 "ti" 1099511627776.0 -}}
{{- $unit := regexFind "[kmgt]i?$" $size -}}
{{- mulf (trimSuffix $unit $size | float64) (get $units $unit | default 1.0) | int64 -}}
{{- end -}}

{{/* What the volume has to hold must fit in it: a pod whose scratch volume is full is evicted. */}}
{{- define "tierserve.checkVolume" -}}
{{- $tiers := .Values.config.tiers | default dict -}}
{{- $name := .Values.persistence.enabled | ternary "persistence.size" "scratchSize" -}}
{{- $size := .Values.persistence.enabled | ternary .Values.persistence.size .Values.scratchSize -}}
{{- $held := 0 -}}
{{- range list "disk" "prefix" -}}
{{- $tier := get $tiers . | default dict -}}
{{- if and $tier.max_bytes (not $tier.path) -}}
{{- $held = add $held (include "tierserve.bytes" $tier.max_bytes) -}}
{{- end -}}
{{- end -}}
{{- if ge $held (include "tierserve.bytes" $size | int64) -}}
{{- printf "%s should be more than config.tiers.disk.max_bytes and config.tiers.prefix.max_bytes together, not %s" $name $size | fail -}}
{{- end -}}
{{- end -}}
